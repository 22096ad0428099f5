"""What a GPU does: speed against the VRAM that engines may use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from report.figures.style import ACCENT, DARK, GREY, MIDDLE, Look, new_figure
from results.card import HYBRID_ARMS, CardFigure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOOKS: dict[str, tuple[str, Look]] = {
    "hot neurons": ("PowerInfer, psp's split", {"color": DARK, "marker": "o"}),
    "scattered neurons": (
        "PowerInfer, neurons by chance",
        {"color": MIDDLE, "marker": "D", "linestyle": ":"},
    ),
    "dense in PowerInfer": ("dense PowerInfer", {"color": GREY, "marker": "s", "linestyle": "--"}),
    "dense in llama.cpp": ("dense llama.cpp", {"color": ACCENT, "marker": "^", "linestyle": "-."}),
}
"""Title and look of each arm."""


def budget_figure(figures: Sequence[CardFigure], width: float) -> Figure:
    """Draw tokens per second against the share of a model that may be in VRAM.

    All text in it is its own, none is a document's.

    Args:
        figures: timed at a budget, see `CardFigure.at_budget`.
        width: inches.
    """
    drawn = new_figure(width, 2.4 + 0.2 * width)
    axes = drawn.subplots()
    for arm in HYBRID_ARMS:
        label, look = _LOOKS[arm]
        points = sorted(
            (100 * place[1], figure.value)
            for figure in figures
            if (place := figure.at_budget) is not None and place[0] == arm
        )
        if points:
            axes.plot(*zip(*points, strict=True), label=label, markersize=4.5, **look)
    axes.set_xlim(-3, 103)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("VRAM, % of what PowerInfer can place there")
    axes.set_ylabel("Decoding, tokens/s")
    drawn.legend(loc="outside lower center", ncols=2, handlelength=2.8)
    return drawn
