"""Speed and memory: bars of arms, bytes of devices, and speed against density."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.units import GIB, MIB
from report.figures.style import (
    ACCENT,
    DARK,
    GREY,
    INK,
    LIGHT,
    MIDDLE,
    PLUM,
    SAND,
    TEAL,
    Look,
    new_figure,
)
from results.bench import Device, RoundSpeeds
from results.density import Point
from results.parts import Speed

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = {
    "ffn_neurons": ("FFN neurons", DARK),
    "predictors": ("predictors", ACCENT),
    "attention": ("attention", MIDDLE),
    "kv_cache": ("KV cache", TEAL),
    "output": ("output", PLUM),
    "embedding": ("embedding", SAND),
    "norms": ("norms", GREY),
}
"""Parts of a model in memory: title and colour, in the order they are stacked."""

ROW, EDGE = 0.5, 0.32
"""Height of a bar with its name, and of what is beside the bars, inches."""

_BAR = 0.36


@dataclass(frozen=True, kw_only=True)
class SpeedBar:
    """What is drawn of an arm.

    Attributes:
        title: its name.
        value: its median, as text.
        strong: whether it is the one that the others are compared with.
        speeds: median and quartiles.
        rounds: tokens per second of each round; may be empty.
    """

    title: str
    value: str
    strong: bool
    speeds: RoundSpeeds
    rounds: tuple[float, ...]

    @property
    def end(self) -> float:
        """The largest number in it."""
        return max(self.speeds.tokens_per_second, *self.speeds.quartiles, *self.rounds)


def speed_bars(axes: Axes, bars: Sequence[SpeedBar], limit: float) -> None:
    """Draw the median of each arm, the middle half of its rounds, and every round.

    Args:
        axes: to draw on.
        bars: first on top.
        limit: end of the axis, tokens per second, the same in all figures to be compared.
    """
    for row, bar in enumerate(bars):
        colour = DARK if bar.strong else LIGHT
        axes.barh(row, bar.speeds.tokens_per_second, _BAR, color=colour)
        _mark_spread(axes, row, bar)
        above = row - _BAR / 2 - 0.06
        axes.text(0, above, bar.title, va="bottom", color=INK)
        axes.text(limit, above, bar.value, va="bottom", ha="right", color=INK, weight="bold")
    axes.set(xlim=(0, limit), ylim=(len(bars) - 0.62, -0.72), yticks=[])
    _bar_axes(axes)


def _mark_spread(axes: Axes, row: float, bar: SpeedBar) -> None:
    if bar.speeds.rounds > 1:
        axes.hlines(row, *bar.speeds.quartiles, color=ACCENT, linewidth=3, zorder=3)
    dots = [row + _BAR / 2 + 0.09] * len(bar.rounds)
    axes.plot(bar.rounds, dots, "|", color=GREY, ms=5, mew=1)


def _bar_axes(axes: Axes) -> None:
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(visible=False, axis="y")


def memory_bars(axes: Axes, devices: Sequence[Device], limit: float) -> None:
    """Draw the bytes of each device, stacked by part.

    Args:
        axes: to draw on.
        devices: with bytes by part (see `PARTS`).
        limit: end of the axis, bytes.
    """
    unit, one = ("GiB", GIB) if limit >= GIB else ("MiB", MIB)
    for row, device in enumerate(devices):
        start = 0.0
        for part, (_, colour) in PARTS.items():
            size = device.bytes.get(part, 0) / one
            axes.barh(row, size, 0.5, start, color=colour)
            start += size
    axes.set(xlim=(0, limit / one), ylim=(len(devices) - 0.5, -0.5), xlabel=unit)
    # Names that a figure may hold, whatever the result says.
    named = enumerate(device.name for device in devices)
    labels = [name if name in ("CPU", "GPU") else f"device {number}" for number, name in named]
    axes.set_yticks(range(len(devices)), labels=labels)
    _bar_axes(axes)


_LINES: dict[str, tuple[str, Look]] = {
    "predicted": ("predicted neurons", {"color": DARK, "marker": "o", "linestyle": "-"}),
    "all_neurons": ("all neurons", {"color": MIDDLE, "marker": "s", "linestyle": "--"}),
    "dense": ("dense", {"color": GREY, "marker": "^", "linestyle": "-."}),
    "dense_llama_cpp": ("dense, llama.cpp", {"color": ACCENT, "marker": "D", "linestyle": ":"}),
}
"""Label and look of each arm; shape and dashes tell them apart without colour."""

_ESTIMATED: Look = {"linestyle": (0, (1, 2)), "linewidth": 1.0, "markerfacecolor": "none"}
_MARK: Look = {"markersize": 4.5}

_HIDDEN = "_estimate: "
"""Begins the labels that are not for the legend, where matplotlib wants an underscore."""


def density_figure(points: Sequence[Point], width: float) -> Figure:
    """Draw tokens per second against density: measured with quartiles, and estimated.

    All text in it is its own, none is a document's.

    Args:
        points: at least one.
        width: inches.
    """
    figure = new_figure(width, 2.4 + 0.2 * width)
    axes = figure.subplots()
    for draw in (_measured, _estimated):
        for arm in _LINES:
            draw(axes, points, arm)
    axes.set_xlim(0, 104)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Neurons predicted, %")
    axes.set_ylabel("Decoding, tokens/s")
    handles = [*axes.containers, *_estimate_key(axes)]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=2.8)
    return figure


def _measured(axes: Axes, points: Sequence[Point], arm: str) -> None:
    """Draw an arm's medians, and its quartiles as bars."""
    every = [(100 * point.density, getattr(point, arm)) for point in points]
    found: list[tuple[float, Speed]] = [(at, speed) for at, speed in every if speed is not None]
    if not found:
        return
    label, look = _LINES[arm]
    at = [density for density, _ in found]
    speeds = [speed.tokens_per_second for _, speed in found]
    below = [speed.tokens_per_second - speed.quartiles[0] for _, speed in found]
    above = [speed.quartiles[1] - speed.tokens_per_second for _, speed in found]
    axes.errorbar(at, speeds, [below, above], label=label, capsize=3, **look | _MARK)


def _estimated(axes: Axes, points: Sequence[Point], arm: str) -> None:
    """Draw what the bandwidths would allow: thin, with the arm's marks but hollow."""
    estimates = ((100 * point.density, (point.estimate or {}).get(arm)) for point in points)
    found = [(density, speed) for density, speed in estimates if speed is not None]
    if found:
        look = _LINES[arm][1] | _ESTIMATED | _MARK
        axes.plot(*zip(*found, strict=True), label=f"{_HIDDEN}{arm}", **look)


def _estimate_key(axes: Axes) -> list[Artist]:
    """Return one entry for all estimates, if there are any."""
    from matplotlib.lines import Line2D

    if not any(str(line.get_label()).startswith(_HIDDEN) for line in axes.lines):
        return []
    look: Look = {"color": GREY, "marker": "o"} | _MARK | _ESTIMATED
    return [Line2D([], [], label="estimate of each", **look)]
