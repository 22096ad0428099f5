"""The pictures of one run, each with what it says in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from powerinfer_bridge.report.formats import per_cent, size, speed
from powerinfer_bridge.report.results import Bench, Run, Spread
from powerinfer_bridge.report.svg import inline_svg
from powerinfer_bridge.report.verdict import ARM_TITLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An `svg` element and the line above it."""

    svg: Markup
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Ends of axes, the same for all runs so that they compare by eye.

    Attributes:
        decode: tokens per second.
        prompt: the same for prompts.
        memory: bytes.
        density: per cent.
    """

    decode: float
    prompt: float
    memory: float
    density: float


def scales(runs: Sequence[Run]) -> Scales:
    """Return ends that hold every run."""
    from powerinfer_bridge.report.quality_figures import density_top
    from powerinfer_bridge.report.speed_figures import limit_of

    arms = [arm for run in runs if run.bench for arm in run.bench.arms]
    prompts = [arm.prompt for arm in arms if arm.prompt is not None]
    sums = [
        sum(parts.values()) for run in runs if run.bench for parts in run.bench.devices.values()
    ]
    return Scales(
        decode=limit_of([arm.decode for arm in arms]) if arms else 1,
        prompt=limit_of(prompts) if prompts else 1,
        memory=1.02 * (max(sums, default=0) or 1),
        density=max((density_top(run.layers) for run in runs if run.layers), default=100),
    )


def speed_pictures(bench: Bench | None, name: str, ends: Scales) -> list[Picture]:
    """Draw decoding, and prompts where they were measured."""
    from powerinfer_bridge.report.speed_figures import speed_bars

    if bench is None:
        return []
    phases = {
        "Decoding, tokens/s": ({arm.name: arm.decode for arm in bench.arms}, ends.decode),
        "Prompt, tokens/s": (
            {arm.name: arm.prompt for arm in bench.arms if arm.prompt is not None},
            ends.prompt,
        ),
    }
    return [
        _picture(speed_bars(arms, limit), f"{name}s{number}", _speed_label(title, arms), title)
        for number, (title, (arms, limit)) in enumerate(phases.items())
        if arms
    ]


def _speed_label(title: str, arms: dict[str, Spread]) -> str:
    words = (
        f"{ARM_TITLES[name]} {speed(arm.median)} "
        f"(quartiles {speed(arm.quartiles[0])} to {speed(arm.quartiles[1])})"
        for name, arm in arms.items()
    )
    return f"Bars. {title}: {'; '.join(words)}."


def layer_pictures(run: Run, name: str, ends: Scales) -> list[Picture]:
    """Draw each layer's sparsity, recall and density."""
    from powerinfer_bridge.report.quality_figures import density_bars, share_bars

    layers = run.layers
    if not layers:
        return []
    titles = {"activation_sparsity": "Activation sparsity, %", "activation_recall": "Recall, %"}
    bars = [
        _picture(share_bars(layers, key), f"{name}l{number}", _layer_label(run, key), title)
        for number, (key, title) in enumerate(titles.items())
    ]
    density = density_bars(layers, ends.density)
    return [
        *bars,
        _picture(
            density, f"{name}ld", _layer_label(run, "predicted_sparsity"), "Neurons computed, %"
        ),
    ]


def _layer_label(run: Run, key: str) -> str:
    values = [layer.metrics[key] for layer in run.layers]
    return (
        f"Bars. {key.replace('_', ' ').capitalize()} of {len(values)} layers: from "
        f"{per_cent(min(values))} to {per_cent(max(values))} per cent; values in the table."
    )


def search_pictures(run: Run, name: str) -> list[Picture]:
    """Draw what the search explored."""
    from powerinfer_bridge.report.quality_figures import search_front

    points = run.predictors.points if run.predictors is not None else ()
    if not points:
        return []
    chosen = [
        f" Chosen: {per_cent(read)} per cent of the bytes at a gap of {per_cent(gap)} per cent."
        for read, gap, taken in points
        if taken
    ]
    label = f"Perplexity gap against FFN bytes of {len(points)} settings.{''.join(chosen)}"
    return [_picture(search_front(points), f"{name}p", label, "Perplexity gap, %")]


def hot_pictures(run: Run, name: str) -> list[Picture]:
    """Draw the share of activations that the most often active neurons make."""
    from powerinfer_bridge.report.quality_figures import hot_curve

    if run.hot is None:
        return []
    tenth = next(
        share for neurons, share in zip(*run.hot.curve, strict=True) if neurons >= 0.1 - 1e-9
    )
    label = f"Curve. The most often active tenth makes {per_cent(tenth)} per cent of activations."
    return [_picture(hot_curve(run.hot), f"{name}h", label, "Activations captured, %")]


def memory_pictures(bench: Bench | None, name: str, ends: Scales) -> list[Picture]:
    """Draw the bytes on each device."""
    from powerinfer_bridge.report.speed_figures import memory_bars

    if bench is None or not bench.devices:
        return []
    sums = (f"{device} {size(sum(parts.values()))}" for device, parts in bench.devices.items())
    label = f"Stacked bars. Memory by device: {'; '.join(sums)}; parts in the table."
    return [_picture(memory_bars(bench.devices, ends.memory), f"{name}m", label, "")]


def density_pictures(run: Run, name: str) -> list[Picture]:
    """Draw speed against density."""
    if run.density is None:
        return []
    from powerinfer_bridge.report.density_figure import density_figure

    label = f"Curves. Tokens per second at {len(run.density['points'])} predicted densities."
    return [_picture(density_figure(run.density), f"{name}d", label, _fixture(run.density))]


def _fixture(density: Mapping[str, Any]) -> str:
    shape = density["shape"]
    return (
        f"{shape['n_layers']} layers, d_model {shape['d_model']}, d_ff {shape['d_ff']}, "
        f"rank {shape['rank']}; threads: {density['threads']}"
    )


def _picture(figure: Figure, name: str, label: str, title: str) -> Picture:
    return Picture(svg=Markup(inline_svg(figure, name, label)), title=title)
