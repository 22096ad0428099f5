"""Pictures of speed and memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from common.plot_style import ACCENT, DARK, GREY, LIGHT, MIDDLE, new_figure
from powerinfer_bridge.report.formats import speed
from powerinfer_bridge.report.results import Spread
from powerinfer_bridge.report.svg import INK, PLUM, SAND, TEAL
from powerinfer_bridge.report.verdict import ARM_TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 3.6
"""Inches, 346 px: as wide as a telephone, so that letters keep their size there."""

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

_ROW, _EDGE = 0.5, 0.32
_BAR = 0.36


def speed_bars(arms: Mapping[str, Spread], limit: float) -> Figure:
    """Draw the median of each arm, the middle half of its rounds, and every round.

    Args:
        arms: tokens per second by arm, first on top.
        limit: end of the axis, tokens per second, the same in all pictures to be compared.
    """
    figure = new_figure(WIDTH, _EDGE + _ROW * len(arms))
    axes = figure.subplots()
    for row, (name, spread) in enumerate(arms.items()):
        colour = DARK if name == "predicted" else LIGHT
        axes.barh(row, spread.median, _BAR, color=colour)
        _mark_spread(axes, row, spread)
        _name_bar(axes, row, ARM_TITLES[name], f"{speed(spread.median)}", limit)
    axes.set(xlim=(0, limit), ylim=(len(arms) - 0.62, -0.72), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(visible=False, axis="y")
    return figure


def _mark_spread(axes: Axes, row: float, spread: Spread) -> None:
    if spread.rounds > 1:
        axes.hlines(row, *spread.quartiles, color=ACCENT, linewidth=3, zorder=3)
    dots = [row + _BAR / 2 + 0.09] * len(spread.samples)
    axes.plot(spread.samples, dots, "|", color=GREY, ms=5, mew=1)


def _name_bar(axes: Axes, row: float, title: str, value: str, limit: float) -> None:
    above = row - _BAR / 2 - 0.06
    axes.text(0, above, title, va="bottom", color=INK)
    axes.text(limit, above, value, va="bottom", ha="right", color=INK, weight="bold")


def limit_of(spreads: Sequence[Spread]) -> float:
    """Return an axis end that holds every median and round."""
    return 1.04 * max(max(each.median, *each.quartiles, *each.samples) for each in spreads)


def memory_bars(devices: Mapping[str, Mapping[str, float]], limit: float) -> Figure:
    """Draw the bytes of each device, stacked by part.

    Args:
        devices: bytes by part (see `PARTS`), by device.
        limit: end of the axis, bytes.
    """
    unit, one = ("GiB", 2**30) if limit >= 2**30 else ("MiB", 2**20)
    figure = new_figure(WIDTH, _EDGE + 0.18 + _ROW * len(devices))
    axes = figure.subplots()
    for row, parts in enumerate(devices.values()):
        start = 0.0
        for part, (_, colour) in PARTS.items():
            axes.barh(row, parts.get(part, 0) / one, 0.5, start, color=colour)
            start += parts.get(part, 0) / one
    axes.set(xlim=(0, limit / one), ylim=(len(devices) - 0.5, -0.5), xlabel=unit)
    axes.set_yticks(range(len(devices)), labels=_device_labels(devices))
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(visible=False, axis="y")
    return figure


def _device_labels(devices: Iterable[str]) -> list[str]:
    """Return names that a picture may hold, whatever the result says."""
    return [
        name if name in ("CPU", "GPU") else f"device {number}"
        for number, name in enumerate(devices)
    ]
