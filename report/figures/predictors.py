"""What predictors do: by layer, by threshold, by setting, and by neuron."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from report.figures.style import (
    ACCENT,
    DARK,
    FEW,
    GREY,
    INK,
    LIGHT,
    MIDDLE,
    Look,
    layer_key,
    layer_ticks,
    line_styles,
    new_figure,
    plain_ticks,
    save,
    style,
)
from results.parts import HotNeurons, Layer
from results.predictors import CurvePoint, PredictorReport, SearchPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Layers = Sequence[Layer]
Floats = npt.NDArray[np.float64]
Curves = dict[int, list[CurvePoint]]


def draw_report(out: Path, report: PredictorReport, dpi: float = 200) -> None:
    """Write every figure of a report as PNG and SVG, the same bytes for the same numbers.

    Args:
        out: existing directory.
        report: with at least one layer.
        dpi: dots per inch of the PNG.
    """
    with style():
        for name, figure in {
            "layers": layers_figure(report.layers),
            "curves": curves_figure(report.curves),
            "search": search_figure(report.search),
            "hot_neurons": hot_figure(report),
        }.items():
            save(figure, out, name, dpi)


def layers_figure(layers: Layers) -> Figure:
    """Draw each layer's sparsity, recall, density and bytes."""
    figure = new_figure(7.2, 5.6)
    sparsity, recall, density, read = figure.subplots(2, 2, sharex=True).flat
    share_bars(sparsity, layers, "activation_sparsity")
    share_bars(recall, layers, "activation_recall")
    computed_bars(density, layers, 1.22 * largest_density(layers))
    _byte_bars(read, layers)
    for axes, title, values, whole in (
        (sparsity, "Activation sparsity", _per_cent(layers, "activation_sparsity"), "neurons"),
        (recall, "Activation recall", _per_cent(layers, "activation_recall"), "active neurons"),
        (density, "Neurons computed", 100 - _per_cent(layers, "predicted_sparsity"), "neurons"),
        (read, "FFN bytes read", _per_cent(layers, "ffn_bytes_ratio"), "a dense FFN's bytes"),
    ):
        axes.set_title(f"{title} (mean {values.mean():.1f} %)", loc="left")
        axes.set_ylabel(f"% of {whole}")
    for axes in (sparsity, recall):
        axes.set_xlabel("")
    for axes in (density, read):
        look: Look = {"columnspacing": 1, "handlelength": 1.3, "borderaxespad": 0.1}
        axes.legend(loc="upper center", ncols=3, **look)
    return figure


def share_bars(axes: Axes, layers: Layers, key: str) -> None:
    """Draw a share of each layer, in per cent.

    Args:
        axes: to draw on.
        layers: at least one.
        key: name of the metric.
    """
    at, width = _places(axes, layers)
    bars = axes.bar(at, _per_cent(layers, key), width, color=MIDDLE)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylim(0, 110 if len(layers) <= FEW else 102)
    if len(layers) <= FEW:
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)


def computed_bars(axes: Axes, layers: Layers, top: float) -> None:
    """Draw the neurons computed, split by whether they are active, and what had to be.

    Args:
        axes: to draw on.
        layers: at least one.
        top: end of the axis, per cent.
    """
    computed = 100 - _per_cent(layers, "predicted_sparsity")
    active = 100 - _per_cent(layers, "activation_sparsity")
    used = computed * _per_cent(layers, "precision") / 100
    at, width = _places(axes, layers)
    axes.bar(at, used, width, color=DARK, label="active")
    wasted: Look = {"color": LIGHT, "edgecolor": MIDDLE, "linewidth": 0, "hatch": "////"}
    axes.bar(at, computed - used, width, used, label="wasted", **wasted)
    perfect: Look = {"color": ACCENT, "lw": 1.6, "label": "perfect predictor"}
    axes.hlines(active, at - width / 2, at + width / 2, **perfect)
    _share_axis(axes, top)


def largest_density(layers: Layers) -> float:
    """Return the largest share of neurons that a layer computes or has to, per cent."""
    keys = ("predicted_sparsity", "activation_sparsity")
    return 100 * max(1e-3, *(1 - float(getattr(each, key)) for each in layers for key in keys))


def _byte_bars(axes: Axes, layers: Layers) -> None:
    """Draw what a token reads of the predictor and of the FFN."""
    total = _per_cent(layers, "ffn_bytes_ratio")
    predictor = total - (100 - _per_cent(layers, "predicted_sparsity"))
    at, width = _places(axes, layers)
    axes.bar(at, predictor, width, color=DARK, label="predictor")
    axes.bar(at, total - predictor, width, predictor, color=LIGHT, label="neurons computed")
    _share_axis(axes, 1.22 * (float(total.max()) or 1))


def _share_axis(axes: Axes, top: float) -> None:
    axes.set_ylim(0, top)
    axes.locator_params(axis="y", nbins=6, steps=[1, 2, 5, 10])


def _per_cent(layers: Layers, key: str) -> Floats:
    return 100 * np.array([getattr(layer, key) for layer in layers], dtype=np.float64)


def _places(axes: Axes, layers: Layers) -> tuple[Floats, float]:
    """Number the layers below the axes; return the places of bars and their width."""
    axes.grid(visible=False, axis="x")
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xticks(*layer_ticks([layer.layer for layer in layers]))
    axes.set_xlabel("Layer")
    # Gaps between many bars would only flicker.
    return np.arange(len(layers), dtype=np.float64), 0.75 if len(layers) <= 4 * FEW else 1.0


def curves_figure(points: Sequence[CurvePoint]) -> Figure:
    """Draw recall, and the output error where known, against density, as the threshold moves."""
    from matplotlib.lines import Line2D

    layers: Curves = {}
    for point in points:
        layers.setdefault(point.layer, []).append(point)
    known = all(point.ffn_output_error is not None for point in points)
    figure = new_figure(7.2 if known else 4.6, 3.5)
    recall, *rest = figure.subplots(1, 2 if known else 1, squeeze=False).flat
    _curves(recall, layers, "recall", 100)
    recall.set_ylabel("Activation recall, %")
    recall.set_ylim(0, 104)
    for axes in rest:
        _curves(axes, layers, "ffn_output_error", 1)
        axes.set_ylabel("FFN output error, relative to ‖x‖²")
        _error_scale(axes, [each.ffn_output_error or 0.0 for each in points if each.chosen])
    layer_key(figure, list(layers))
    mark = Line2D([], [], color="white", marker="o", mec=INK, ls="", label="exported threshold")
    figure.legend(handles=[mark], loc="outside upper center")
    return figure


def _curves(axes: Axes, layers: Curves, key: str, unit: float) -> None:
    size: Look = {"ms": 6, "mew": 0.8} if len(layers) <= FEW else {"ms": 4, "mew": 0.4}
    for points, line in zip(layers.values(), line_styles(len(layers)), strict=True):
        pairs = [(100 * each.density, unit * getattr(each, key)) for each in points]
        axes.plot(*zip(*pairs, strict=True), **line)
        chosen = [pair for pair, each in zip(pairs, points, strict=True) if each.chosen]
        mark = size | {"color": line["color"], "mec": INK, "zorder": 3}
        axes.plot(*zip(*chosen, strict=True), "o", **mark)
    lowest = min(each.density for points in layers.values() for each in points if each.chosen)
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


def search_figure(points: Sequence[SearchPoint]) -> Figure:
    """Draw explored points, bytes against perplexity gap, and say how many have none."""
    figure = new_figure(5.2, 3.6)
    axes = figure.subplots()
    known = [point for point in points if point.ppl_gap is not None]
    if not known:
        axes.set_axis_off()
        where: Look = {"ha": "center", "va": "center", "transform": axes.transAxes}
        axes.text(0.5, 0.5, "no explored point with a perplexity gap", **where)
        return figure
    search_front(axes, known)
    axes.set_ylabel("Perplexity gap, %")
    without = len(points) - len(known)
    note = f"not shown: {without} without a measured gap" if without else None
    figure.legend(loc="outside upper center", ncols=3, title=note)
    return figure


def search_front(axes: Axes, points: Sequence[SearchPoint]) -> None:
    """Draw explored points and the front that none beats.

    Args:
        axes: to draw on.
        points: those with a perplexity gap, at least one.
    """
    pairs = [(100 * each.ffn_bytes_ratio, 100 * (each.ppl_gap or 0.0)) for each in points]
    axes.plot(*zip(*pairs, strict=True), "o", color=GREY, ms=5, label="explored")
    front: Look = {"where": "post", "color": DARK, "marker": "o", "ms": 5, "label": "front"}
    axes.step(*zip(*pareto_front(pairs), strict=True), **front)
    taken = [pair for pair, each in zip(pairs, points, strict=True) if each.chosen]
    if taken:
        star: Look = {"color": ACCENT, "mec": INK, "ms": 13, "zorder": 3, "label": "chosen"}
        axes.plot(*zip(*taken, strict=True), "*", **star)
    _gap_scale(axes, [gap for _, gap in pairs])
    axes.set_xlabel("FFN bytes read, % of dense")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats or equals in both numbers, by ascending first one."""
    kept: list[tuple[float, float]] = []
    for first, second in sorted(points):
        if not kept or second < kept[-1][1]:
            kept.append((first, second))
    return kept


def _gap_scale(axes: Axes, gaps: Sequence[float]) -> None:
    """Take a logarithmic axis where gaps span decades, linear about 0 if some are not above it."""
    smallest, largest = min(gaps), max(map(abs, gaps))
    if smallest > 0 and largest > 10 * smallest:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis, axes.get_ylim())
    elif smallest <= 0:
        if largest > 0.1:
            axes.set_yscale("symlog", linthresh=0.01)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.axhline(0, color=INK, linewidth=0.8)


def hot_figure(report: PredictorReport) -> Figure:
    """Draw the share of activations that the hottest neurons make, by layer and of all."""
    figure = new_figure(5.2, 3.6)
    axes = figure.subplots()
    numbers = [layer.layer for layer in report.layers]
    for number, line in zip(numbers, line_styles(len(numbers)), strict=True):
        if (hot := report.hot(number)) is not None:
            axes.plot(*_hot_shares(hot), **line)
    hot_curve(axes, report.hot())
    if axes.get_legend_handles_labels()[1]:
        # A curve of the hottest first never passes below the diagonal.
        axes.legend(loc="lower right")
    axes.set_ylabel("Activations captured, %")
    layer_key(figure, numbers)
    return figure


def hot_curve(axes: Axes, hot: HotNeurons | None) -> None:
    """Draw the share of activations that the most often active neurons make.

    Args:
        axes: to draw on.
        hot: of all layers together; None leaves the axes empty.
    """
    axes.plot([0, 100], [0, 100], color=GREY, lw=0.8, ls=(0, (4, 3)))
    if hot is not None:
        shares = _hot_shares(hot)
        axes.fill_between(*shares, color=LIGHT, alpha=0.35, linewidth=0)
        axes.plot(*shares, color=INK, lw=2.2, label="all layers")
        if hot.gpu_neuron_share is not None and hot.gpu_activation_share is not None:
            _mark_gpu(axes, 100 * hot.gpu_neuron_share, 100 * hot.gpu_activation_share)
    axes.set(xlim=(0, 100), ylim=(0, 102), xlabel="Most often active neurons, %")


def _hot_shares(hot: HotNeurons) -> tuple[Floats, Floats]:
    return 100 * np.array(hot.neuron_share), 100 * np.array(hot.activation_share)


def _mark_gpu(axes: Axes, neurons: float, activations: float) -> None:
    axes.plot([neurons, neurons, 0], [0, activations, activations], color=ACCENT, lw=1.2)
    axes.plot(neurons, activations, "o", color=ACCENT, ms=6)
    side, shift = ("left", 3) if neurons < 55 else ("right", -3)
    text = f"on the GPU: {neurons:.1f} %\nof neurons, {activations:.1f} %\nof activations"
    axes.text(neurons + shift, activations - 8, text, ha=side, va="top", color=INK)
