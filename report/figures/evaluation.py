"""What arms answer: scores with their errors, and answers that changed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from report.figures.style import (
    ACCENT,
    COCOA,
    DARK,
    GREY,
    INK,
    LIGHT,
    MIDDLE,
    OLIVE,
    PLUM,
    ROSE,
    SAND,
    TEAL,
    Look,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARM_COLOURS = (DARK, MIDDLE, SAND, PLUM, GREY, OLIVE, ROSE, COCOA)
"""Of arms in their order; more arms begin again, their order still tells them apart."""

RIGHT, WRONG, OTHER = TEAL, ACCENT, LIGHT
"""Colours of answers that became right, became wrong, and changed without becoming either."""

NORMAL_95 = 1.96
"""Standard errors on each side that hold 95 % of a normal distribution."""

_ROW, _EDGE = 0.19, 0.42
"""Inches: height of a bar with its gap, and of what is above and below all bars."""

_BAR, _TITLE, _GAP = 0.74, 1.15, 0.55
"""In rows: a bar, the title above a group, the gap below it."""

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_ .,:@+-]{0,40}")


@dataclass(frozen=True, kw_only=True)
class ScoreBar:
    """An arm's score.

    Attributes:
        arm: its number, from 0.
        percent: the score.
        error: its standard error, percentage points; None if unknown.
    """

    arm: int
    percent: float
    error: float | None


@dataclass(frozen=True, kw_only=True)
class ScoreGroup:
    """Scores of one task, column or group of tasks.

    Attributes:
        title: its name, whatever it holds; see `drawn_title`.
        chance: per cent by guessing, None if unknown.
        bars: in the order of the arms; an arm may be missing.
    """

    title: str
    chance: float | None
    bars: tuple[ScoreBar, ...]


@dataclass(frozen=True, kw_only=True)
class ChangedBar:
    """Answers of an arm that are not the first arm's.

    Attributes:
        arm: its number, from 1.
        percent: of the questions.
        right: questions that only this arm answers rightly; None if it cannot be told.
        wrong: questions that only the first arm answers rightly.
        questions: that were compared.
    """

    arm: int
    percent: float
    right: int | None
    wrong: int | None
    questions: int

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """Colour and per cent of each part of the bar."""
        if self.right is None or self.wrong is None:
            return ((OTHER, self.percent),)
        counts = (min(count, self.questions) for count in (self.right, self.wrong))
        right, wrong = (100 * count / self.questions for count in counts)
        return (RIGHT, right), (WRONG, wrong), (OTHER, max(0.0, self.percent - right - wrong))

    @property
    def value(self) -> str:
        """The numbers, as text."""
        counts = "" if self.right is None else f"  +{self.right:,} −{self.wrong:,}"
        return f"{self.percent:.1f} %{counts}"


@dataclass(frozen=True, kw_only=True)
class ChangedGroup:
    """Changed answers to one task, or to several.

    Attributes:
        title: see `ScoreGroup`.
        bars: in the order of the arms, the first left out.
    """

    title: str
    bars: tuple[ChangedBar, ...]


def drawn_title(title: str, number: int) -> str:
    """Return a name that a figure may hold, whatever the result says.

    Args:
        title: the name.
        number: from 1, stands for a name of other characters than those of lm-eval's own.
    """
    return title if _SAFE.fullmatch(title) else f"task {number}"


def score_figure(groups: Sequence[ScoreGroup], arms: int, width: float) -> Figure:
    """Draw scores in per cent with bars of 95 %, and where guessing would be.

    Args:
        groups: at least one, first on top.
        arms: how many there are; each has a place of its own in a group.
        width: inches.
    """
    figure, axes = _panel(len(groups), arms, width)
    for number, group in enumerate(groups):
        top = number * _pitch(arms)
        _title(axes, top, drawn_title(group.title, number + 1))
        for bar in group.bars:
            _score(axes, top + _TITLE + bar.arm, bar)
        if group.chance is not None:
            ends = top + _TITLE - 0.5, top + _TITLE + arms - 0.5
            axes.vlines(group.chance, *ends, color=ACCENT, linewidth=1.4, linestyle=(0, (2, 1)))
    axes.set(xlim=(0, 100))
    return figure


def changed_figure(groups: Sequence[ChangedGroup], arms: int, width: float) -> Figure:
    """Draw the share of answers that changed: became right, became wrong, neither.

    Bars are as far down as those of the same arms in `score_figure`; where the first arm's would
    be is the title.

    Args:
        groups: at least one, first on top.
        arms: how many there are, the first included, which has no bar.
        width: inches.
    """
    figure, axes = _panel(len(groups), arms, width)
    for number, group in enumerate(groups):
        top = number * _pitch(arms) + _TITLE
        _title(axes, top, drawn_title(group.title, number + 1))
        for bar in group.bars:
            _changed(axes, top + bar.arm, bar)
    longest = max((bar.percent for group in groups for bar in group.bars), default=0.0)
    axes.set(xlim=(0, 1.04 * longest or 1.0))
    return figure


def _pitch(rows: int) -> float:
    return _TITLE + rows + _GAP


def _panel(groups: int, rows: int, width: float) -> tuple[Figure, Axes]:
    """Return an empty figure whose axis down is in rows."""
    end = groups * _pitch(rows) - _GAP
    figure = new_figure(width, _EDGE + _ROW * end)
    axes: Axes = figure.subplots()
    axes.set(ylim=(end - 0.3, -0.6), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(visible=False, axis="y")
    return figure, axes


def _title(axes: Axes, row: float, text: str) -> None:
    axes.text(0, row, text, va="center", color=INK, parse_math=False)


def _score(axes: Axes, row: float, bar: ScoreBar) -> None:
    axes.barh(row, bar.percent, _BAR, color=ARM_COLOURS[bar.arm % len(ARM_COLOURS)])
    if bar.error is not None:
        spread = min(100.0, NORMAL_95 * bar.error)
        axes.errorbar(bar.percent, row, xerr=spread, color=GREY, capsize=2, linewidth=1.2)
    axes.text(101.5, row, f"{bar.percent:.1f}", va="center", color=INK, fontsize=8.5)


def _changed(axes: Axes, row: float, bar: ChangedBar) -> None:
    start = 0.0
    for colour, percent in bar.parts:
        axes.barh(row, percent, _BAR, start, color=colour)
        start += percent
    beside = axes.get_yaxis_transform()
    colour = ARM_COLOURS[bar.arm % len(ARM_COLOURS)]
    axes.plot(-0.035, row, "s", transform=beside, color=colour, markersize=6, clip_on=False)
    look: Look = {"transform": beside, "va": "center", "color": INK, "fontsize": 8.5}
    axes.text(1.015, row, bar.value, **look)
