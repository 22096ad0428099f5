"""The plots of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.plot_style import (
    ACCENT,
    DARK,
    FEW,
    GREY,
    LIGHT,
    MIDDLE,
    layer_key,
    layer_ticks,
    line_styles,
    new_figure,
    plain_ticks,
    style,
)
from predictor.reporting.metrics import Floats, LayerMeasurement, hot_neuron_curve, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Layers = Sequence[LayerMeasurement]
Points = Sequence[Mapping[str, Any]]


def draw(out: Path, layers: Layers, points: Points) -> None:
    """Write every plot as PNG and SVG, the same bytes for the same numbers.

    Args:
        out: existing directory.
        layers: at least one measured layer.
        points: explored points, see `predictor.report.write_report`.
    """
    with style():
        figures = {
            "layers": layer_bars(layers),
            "curves": threshold_curves(layers),
            "search": search_front(points),
            "hot_neurons": hot_neurons(layers),
        }
        for name, figure in figures.items():
            figure.savefig(out / f"{name}.png")
            figure.savefig(out / f"{name}.svg", metadata={"Date": None})


def layer_bars(layers: Layers) -> Figure:
    """Draw each layer's sparsity, recall, density and bytes."""
    figure = new_figure(7.2, 5.6)
    sparsity, recall, density, read = figure.subplots(2, 2, sharex=True).flat
    _plain_bars(sparsity, layers, "activation_sparsity")
    _plain_bars(recall, layers, "activation_recall")
    _density_bars(density, layers)
    _byte_bars(read, layers)
    labels = ("neurons", "active neurons", "neurons", "a dense FFN's bytes")
    for axes, label in zip((sparsity, recall, density, read), labels, strict=True):
        axes.set_ylabel(f"% of {label}")
        axes.grid(visible=False, axis="x")
    for axes in (density, read):
        axes.set_xlabel("Layer")
        axes.set_xticks(*layer_ticks([layer.layer for layer in layers]))
    return figure


def _per_cent(layers: Layers, key: str) -> Floats:
    return 100 * np.array([layer.metrics[key] for layer in layers])


def _width(layers: Layers) -> float:
    """Return the width of a bar: gaps between many would only flicker."""
    return 0.8 if len(layers) <= 4 * FEW else 1.0


def _plain_bars(axes: Axes, layers: Layers, key: str) -> None:
    values = _per_cent(layers, key)
    _title(axes, key.replace("_", " ").capitalize(), values)
    bars = axes.bar(np.arange(len(layers)), values, _width(layers), color=MIDDLE)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylim(0, 112 if len(layers) <= FEW else 104)
    if len(layers) <= FEW:
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)


def _density_bars(axes: Axes, layers: Layers) -> None:
    """Draw what is computed, split by whether it is active, and what a perfect one would."""
    at, width = np.arange(len(layers)), _width(layers)
    predicted = 100 - _per_cent(layers, "predicted_sparsity")
    active = 100 - _per_cent(layers, "activation_sparsity")
    used = predicted * _per_cent(layers, "precision") / 100
    _title(axes, "Neurons computed", predicted)
    axes.bar(at, used, width, color=DARK, label="active")
    wasted: Any = {"color": LIGHT, "edgecolor": MIDDLE, "linewidth": 0, "hatch": "////"}
    axes.bar(at, predicted - used, width, used, label="wasted", **wasted)
    axes.hlines(active, at - 0.45, at + 0.45, color="black", lw=1.5, label="perfect predictor")
    _legend_above(axes, max(predicted.max(), active.max()))


def _byte_bars(axes: Axes, layers: Layers) -> None:
    """Draw what a token reads of the predictor and of the FFN."""
    at, width = np.arange(len(layers)), _width(layers)
    total = _per_cent(layers, "ffn_bytes_ratio")
    predictor = total - (100 - _per_cent(layers, "predicted_sparsity"))
    _title(axes, "FFN bytes ratio", total)
    axes.bar(at, predictor, width, color=DARK, label="predictor")
    axes.bar(at, total - predictor, width, predictor, color=LIGHT, label="neurons computed")
    _legend_above(axes, total.max())


def _title(axes: Axes, name: str, values: Floats) -> None:
    axes.set_title(f"{name} (mean {values.mean():.1f} %)", loc="left")


def _legend_above(axes: Axes, highest: float) -> None:
    """Leave a strip above the data for one line of legend."""
    axes.set_ylim(0, 1.22 * (highest or 1))
    axes.locator_params(axis="y", nbins=6, steps=[1, 2, 5, 10])
    axes.legend(loc="upper center", ncols=3, columnspacing=1, handlelength=1.3, borderaxespad=0.1)


def threshold_curves(layers: Layers) -> Figure:
    """Draw recall, and the output error where known, against density, as the threshold moves."""
    from matplotlib.lines import Line2D

    errors = [e for layer in layers if (e := layer.curve.ffn_output_error) is not None]
    figure = new_figure(7.2 if errors else 4.6, 3.5)
    recall, *rest = figure.subplots(1, 2 if errors else 1, squeeze=False).flat
    _curves(recall, layers, [100 * layer.curve.recall for layer in layers])
    recall.set_ylabel("Activation recall, %")
    recall.set_ylim(0, 104)
    for axes in rest:
        _curves(axes, layers, errors)
        axes.set_ylabel("FFN output error, relative to ‖x‖²")
        _error_scale(
            axes, [float(e[layer.chosen]) for e, layer in zip(errors, layers, strict=True)]
        )
    layer_key(figure, [layer.layer for layer in layers])
    mark = Line2D([], [], color="white", marker="o", mec="black", ls="", label="exported threshold")
    figure.legend(handles=[mark], loc="outside upper center")
    return figure


def _curves(axes: Axes, layers: Layers, values: Sequence[torch.Tensor]) -> None:
    size: Any = {"ms": 6, "mew": 0.8} if len(layers) <= FEW else {"ms": 4, "mew": 0.4}
    for layer, column, line in zip(layers, values, line_styles(len(layers)), strict=True):
        density, at = 100 * layer.curve.density, layer.chosen
        axes.plot(density, column, **line)
        mark = size | {"color": line["color"], "mec": "black", "zorder": 3}
        axes.plot(density[at], column[at], "o", **mark)
    lowest = min(float(layer.curve.density[layer.chosen]) for layer in layers)
    axes.set_xscale("log")
    axes.set_xlim(100 * max(lowest / 4, 1e-4), 110)
    plain_ticks(axes.xaxis, axes.get_xlim())
    axes.set_xlabel("Neurons computed, %")


def _error_scale(axes: Axes, chosen: Sequence[float]) -> None:
    """Show the decades about the chosen points; linear where none of them loses anything."""
    positive = [value for value in chosen if value > 0]
    if positive:
        axes.set_yscale("log")
        axes.set_ylim(min(positive) / 30, max(positive) * 30)


def search_front(points: Points) -> Figure:
    """Draw explored points, bytes against perplexity gap, and the front that none beats."""
    figure = new_figure(5.2, 3.6)
    axes = figure.subplots()
    known = [point for point in points if point.get("ppl_gap") is not None]
    pairs = [(100 * point["ffn_bytes_ratio"], 100 * point["ppl_gap"]) for point in known]
    if not pairs:
        axes.set_axis_off()
        where: Any = {"ha": "center", "va": "center", "transform": axes.transAxes}
        axes.text(0.5, 0.5, "no explored point with a perplexity gap", **where)
        return figure
    front: Any = {"where": "post", "color": DARK, "marker": "o", "ms": 5, "label": "front"}
    axes.plot(*zip(*pairs, strict=True), "o", color=GREY, ms=5, label="explored")
    axes.step(*zip(*pareto_front(pairs), strict=True), **front)
    taken = [pair for pair, point in zip(pairs, known, strict=True) if point.get("chosen")]
    if taken:
        star: Any = {"color": ACCENT, "mec": "black", "ms": 13, "zorder": 3, "label": "chosen"}
        axes.plot(*zip(*taken, strict=True), "*", **star)
    _gap_scale(axes, [gap for _, gap in pairs])
    axes.set_xlabel("FFN bytes ratio, %")
    axes.set_ylabel("Perplexity gap, %")
    without = len(points) - len(known)
    note = f"not shown: {without} without a measured gap" if without else None
    figure.legend(loc="outside upper center", ncols=3, title=note)
    return figure


def _gap_scale(axes: Axes, gaps: Sequence[float]) -> None:
    """Take a logarithmic axis where gaps span decades, linear about 0 if some are not positive."""
    smallest, largest = min(gaps), max(map(abs, gaps))
    if smallest > 0 and largest > 10 * smallest:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis, axes.get_ylim())
    elif smallest <= 0:
        if largest > 0.1:
            axes.set_yscale("symlog", linthresh=0.01)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.axhline(0, color="black", linewidth=0.8)


def hot_neurons(layers: Layers) -> Figure:
    """Draw the share of activations that the hottest neurons capture."""
    figure = new_figure(5.2, 3.6)
    axes = figure.subplots()
    for layer, line in zip(layers, line_styles(len(layers)), strict=True):
        if (curve := hot_neuron_curve(layer.activation_counts)) is not None:
            axes.plot(100 * curve[0], 100 * curve[1], **line)
    together = hot_neuron_curve(torch.stack([layer.activation_counts for layer in layers]))
    if together is not None:
        axes.plot(100 * together[0], 100 * together[1], color="black", lw=2.4, label="all layers")
        # A curve of the hottest first never passes below the diagonal.
        axes.legend(loc="lower right")
    axes.set(xlim=(0, 100), ylim=(0, 102))
    axes.set_xlabel("Hottest neurons, %")
    axes.set_ylabel("Activations captured, %")
    layer_key(figure, [layer.layer for layer in layers])
    return figure
