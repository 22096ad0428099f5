"""How figures look: for print, readable in greyscale, two layers or eighty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, PAPER, RULE = "#000000", "#ffffff", "#e3e3e3"
DARK, MIDDLE, LIGHT, GREY, ACCENT = "#27476e", "#5b8fc7", "#bfd1e6", "#9a9a9a", "#c8442b"
TEAL, SAND, PLUM = "#2f8f83", "#d9a441", "#8a5a9e"
OLIVE, ROSE, COCOA = "#7d8f2e", "#c98bb0", "#7a5138"

Look = dict[str, Any]
"""Keywords of matplotlib's artists."""

FEW = 8
"""Up to so many layers get a legend and numbers on their bars; more get a colour bar."""

_TICKS = 12
_DASHES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1)))
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.framealpha": 1,
    "legend.edgecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "svg.hashsalt": "psp",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in this style whatever the user's matplotlibrc says, and leave his as it was."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches that belongs to nobody.

    pyplot would keep it, and would choose a window system.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def arrange(figure: Figure) -> None:
    """Give everything in a finished figure of `new_figure` its place, for good.

    Else matplotlib lays it out anew for every file, and draws it once more to do so.
    """
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine(None)


def save(figure: Figure, out: Path, name: str, dpi: float = 200) -> list[Path]:
    """Write a figure as PNG and SVG, the same bytes for the same figure, and return the files."""
    files = [out / f"{name}.png", out / f"{name}.svg"]
    arrange(figure)
    figure.savefig(files[0], dpi=dpi)
    figure.savefig(files[1], metadata={"Date": None})
    return files


def layer_ticks(names: Sequence[int]) -> tuple[list[int], list[str]]:
    """Return positions and labels of at most a dozen layers, evenly spaced."""
    kept = list(range(0, len(names), -(-len(names) // _TICKS)))
    return kept, [str(names[position]) for position in kept]


def plain_ticks(axis: Axis, limits: tuple[float, float]) -> None:
    """Label a logarithmic axis with plain numbers, those at 2 and 5 too if it is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    subs = (1, 2, 5) if limits[1] < 1000 * limits[0] else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=_TICKS))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def line_styles(count: int) -> list[Look]:
    """Return a style for each layer: lighter with depth; few layers get dashes as well."""
    import matplotlib

    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, count))
    if count > FEW:
        return [{"color": shade, "linewidth": 0.9} for shade in shades]
    return [
        {"color": shade, "linestyle": _DASHES[number % len(_DASHES)]}
        for number, shade in enumerate(shades)
    ]


def layer_key(figure: Figure, names: Sequence[int]) -> None:
    """Name the layers beside the plots: by a legend if they are few, by a colour bar if not."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.lines import Line2D

    looks = line_styles(len(names))
    if len(names) <= FEW:
        lines = [
            Line2D([], [], label=str(name), **look) for name, look in zip(names, looks, strict=True)
        ]
        figure.legend(handles=lines, title="Layer", loc="outside right center", handlelength=2.6)
        return
    shades = ListedColormap([look["color"] for look in looks])
    mapped = ScalarMappable(Normalize(-0.5, len(names) - 0.5), shades)
    bar = figure.colorbar(mapped, ax=figure.axes, label="Layer")
    bar.ax.grid(visible=False)
    ticks, labels = layer_ticks(names)
    bar.set_ticks(ticks, labels=labels)
