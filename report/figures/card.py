"""What a GPU does: speed against the VRAM that engines may use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from report.figures.style import (
    ACCENT,
    DARK,
    GREY,
    MIDDLE,
    Look,
    new_figure,
    plain_ticks,
    save,
    style,
)
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

_MARGIN, _WIDE = 1.1, 5.0
"""Factor beside the points; inches from which two titles stand beside each other."""


def budgets_of(figures: Sequence[CardFigure]) -> dict[str, list[CardFigure]]:
    """Return what was timed at budgets of VRAM, by step."""
    timed = [figure for figure in figures if figure.at_budget is not None]
    steps = dict.fromkeys(figure.step for figure in timed)
    return {step: [figure for figure in timed if figure.step == step] for step in steps}


def draw_budgets(out: Path, figures: Sequence[CardFigure]) -> list[Path]:
    """Write `hybrid-STEP.png` and `.svg` for every step that timed budgets; return the files."""
    with style():
        return [
            file
            for step, timed in budgets_of(figures).items()
            for file in save(budget_figure(timed, width=6.4), out, f"hybrid-{step}")
        ]


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
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    limits = (low / _MARGIN, high * _MARGIN)
    axes.set_ylim(*limits)
    plain_ticks(axes.yaxis, limits)
    axes.set_xlabel("VRAM, % of what PowerInfer can place there")
    axes.set_ylabel("Decoding, tokens/s")
    drawn.legend(loc="outside lower center", ncols=1 if width < _WIDE else 2, handlelength=2.8)
    return drawn
