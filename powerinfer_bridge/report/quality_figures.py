"""Pictures of what predictors do: by layer, by setting, and by neuron."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common.plot_style import (
    ACCENT,
    DARK,
    FEW,
    GREY,
    LIGHT,
    MIDDLE,
    layer_ticks,
    new_figure,
    plain_ticks,
)
from powerinfer_bridge.report.results import HotNeurons, Layer
from powerinfer_bridge.report.speed_figures import WIDTH
from powerinfer_bridge.report.svg import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEIGHT = 2.3


def share_bars(layers: Sequence[Layer], key: str) -> Figure:
    """Draw one share of each layer, in per cent.

    Args:
        layers: at least one.
        key: name of the metric.
    """
    figure, axes = _layer_axes(layers)
    values = np.array([100 * layer.metrics[key] for layer in layers])
    bars = axes.bar(np.arange(len(layers)), values, _width(layers), color=MIDDLE)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylim(0, 108 if len(layers) <= FEW else 100)
    if len(layers) <= FEW:
        labels = [f"{value:.0f}" if value < 99.5 else f"{value:.1f}" for value in values]
        axes.bar_label(bars, labels, padding=2, color=INK)
    return figure


def density_bars(layers: Sequence[Layer], top: float) -> Figure:
    """Draw the neurons computed, split by whether they are active, and what had to be.

    Args:
        layers: at least one.
        top: end of the axis, per cent.
    """
    figure, axes = _layer_axes(layers)
    at, width = np.arange(len(layers)), _width(layers)
    computed = np.array([100 * (1 - layer.metrics["predicted_sparsity"]) for layer in layers])
    used = computed * np.array([layer.metrics["precision"] for layer in layers])
    active = [100 * (1 - layer.metrics["activation_sparsity"]) for layer in layers]
    axes.bar(at, used, width, color=DARK)
    axes.bar(at, computed - used, width, used, color=LIGHT)
    axes.hlines(active, at - width / 2, at + width / 2, color=ACCENT, lw=1.6)
    axes.set_ylim(0, top)
    axes.locator_params(axis="y", nbins=6, steps=[1, 2, 5, 10])
    return figure


def density_top(layers: Sequence[Layer]) -> float:
    """Return an axis end that holds every layer's density, per cent."""
    keys = ("predicted_sparsity", "activation_sparsity")
    return 106 * max(1e-3, *(1 - layer.metrics[key] for layer in layers for key in keys))


def _layer_axes(layers: Sequence[Layer]) -> tuple[Figure, Axes]:
    figure = new_figure(WIDTH, _HEIGHT)
    axes = figure.subplots()
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="x", length=0)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks(*layer_ticks([layer.number for layer in layers]))
    axes.set_xlabel("layer")
    return figure, axes


def _width(layers: Sequence[Layer]) -> float:
    return 0.72 if len(layers) <= 4 * FEW else 1.0


def search_front(points: Sequence[tuple[float, float, bool]]) -> Figure:
    """Draw what the search explored, and the points that no other beats in both.

    Args:
        points: FFN bytes ratio, perplexity gap, whether it was chosen; at least one.
    """
    figure = new_figure(WIDTH, 2.7)
    axes = figure.subplots()
    pairs = [(100 * read, 100 * gap) for read, gap, _ in points]
    axes.plot(*zip(*pairs, strict=True), "o", color=GREY, ms=4)
    front: Any = {"where": "post", "color": DARK, "marker": "o", "ms": 5}
    axes.step(*zip(*_front(pairs), strict=True), **front)
    chosen = [pair for pair, (_, _, taken) in zip(pairs, points, strict=True) if taken]
    if chosen:
        axes.plot(*zip(*chosen, strict=True), "*", color=ACCENT, ms=13, zorder=3)
    _gap_scale(axes, [gap for _, gap in pairs])
    axes.set_xlabel("FFN bytes read, % of dense")
    return figure


def _front(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    kept: list[tuple[float, float]] = []
    for first, second in sorted(pairs):
        if not kept or second < kept[-1][1]:
            kept.append((first, second))
    return kept


def _gap_scale(axes: Axes, gaps: Sequence[float]) -> None:
    """Take a logarithmic axis where gaps span decades; mark 0 where some are not above it."""
    smallest, largest = min(gaps), max(gaps)
    if smallest > 0 and largest > 10 * smallest:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis, axes.get_ylim())
    elif smallest <= 0:
        axes.axhline(0, color=INK, linewidth=0.8)


def hot_curve(hot: HotNeurons) -> Figure:
    """Draw the share of activations that the most often active neurons make."""
    figure = new_figure(WIDTH, 2.7)
    axes = figure.subplots()
    neurons, activations = (100 * np.array(axis) for axis in hot.curve)
    axes.fill_between(neurons, activations, color=LIGHT, alpha=0.35, linewidth=0)
    axes.plot(neurons, activations, color=DARK, lw=2)
    axes.plot([0, 100], [0, 100], color=GREY, lw=0.8, ls=(0, (4, 3)))
    if hot.on_gpu is not None:
        _mark_gpu(axes, 100 * hot.on_gpu[0], 100 * hot.on_gpu[1])
    axes.set(xlim=(0, 100), ylim=(0, 102))
    axes.set_xlabel("most often active neurons, %")
    return figure


def _mark_gpu(axes: Axes, neurons: float, activations: float) -> None:
    axes.plot([neurons, neurons, 0], [0, activations, activations], color=ACCENT, lw=1.2)
    axes.plot(neurons, activations, "o", color=ACCENT, ms=6)
    side = "left" if neurons < 55 else "right"
    shift = 3 if side == "left" else -3
    text = f"on the GPU: {neurons:.1f} %\nof neurons, {activations:.1f} %\nof activations"
    axes.text(neurons + shift, activations - 8, text, ha=side, va="top", color=INK)
