"""The pictures of one run: figures as SVG elements in the page's colours, and what they say."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup, escape

from common.units import size
from report.answers import changed_groups, score_groups
from report.figures import card, evaluation, predictors, speed
from report.figures.style import (
    ACCENT,
    COCOA,
    DARK,
    GREY,
    INK,
    LIGHT,
    MIDDLE,
    OLIVE,
    PAPER,
    PLUM,
    ROSE,
    RULE,
    SAND,
    TEAL,
    arrange,
    new_figure,
    style,
)
from report.runs import Run
from report.words import ARM_TITLES, arms_in_order, per_cent, tokens_per_second, visible
from results.bench import Bench, Device, round_speeds
from results.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 3.6
"""Inches, 346 px: as wide as a telephone, so that letters keep their size there."""

COLOURS = {
    INK: ("ink", "#1c2430", "#e6e9ee"),
    PAPER: ("paper", "#ffffff", "#14181f"),
    RULE: ("rule", "#e1e5ea", "#323a46"),
    DARK: ("dark", DARK, "#8fb8ec"),
    MIDDLE: ("middle", MIDDLE, "#4f81bb"),
    LIGHT: ("light", LIGHT, "#34506f"),
    GREY: ("grey", "#8b929c", "#868e99"),
    ACCENT: ("accent", ACCENT, "#ff8a6b"),
    TEAL: ("teal", TEAL, "#4fbdae"),
    SAND: ("sand", SAND, "#e3b65c"),
    PLUM: ("plum", PLUM, "#b98bcd"),
    OLIVE: ("olive", OLIVE, "#a9bd52"),
    ROSE: ("rose", ROSE, "#e0abc8"),
    COCOA: ("cocoa", COCOA, "#b58a6e"),
}
"""What matplotlib draws in, and the page's variable for it: name, by day, by night."""

_PAGE_STYLE: Any = {
    "svg.fonttype": "none",  # letters stay letters: the page's font, colour and search
    "font.size": 9.5,
    "figure.constrained_layout.w_pad": 0.01,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.facecolor": "none",
    "legend.framealpha": 0,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
}

_PHASES: dict[Literal["decode", "prompt"], str] = {
    "decode": "Decoding, tokens/s",
    "prompt": "Prompt, tokens/s",
}


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
    benches = [run.bench for run in runs if run.bench is not None]
    decode, prompt = (
        [bar.end for bench in benches for bar in _bars(bench, phase)] for phase in _PHASES
    )
    sums = [sum(device.bytes.values()) for bench in benches for device in _devices(bench)]
    densities = [predictors.largest_density(run.layers) for run in runs if run.layers]
    return Scales(
        decode=1.04 * max(decode, default=1),
        prompt=1.04 * max(prompt, default=1),
        memory=1.02 * (max(sums, default=0) or 1),
        density=1.06 * max(densities, default=100),
    )


def speed_pictures(run: Run, name: str, ends: Scales) -> list[Picture]:
    """Draw decoding, and prompts where they were measured."""
    pictures = []
    for number, (phase, title) in enumerate(_PHASES.items()):
        bars = [] if run.bench is None else _bars(run.bench, phase)
        if bars:
            height = speed.EDGE + speed.ROW * len(bars)
            figure = _figure(height, speed.speed_bars, bars, getattr(ends, phase))
            label = f"Bars. {title}: {'; '.join(map(_spoken, bars))}."
            pictures.append(_picture(figure, f"{name}s{number}", label, title))
    return pictures


def _bars(bench: Bench, phase: Literal["decode", "prompt"]) -> list[speed.SpeedBar]:
    return [
        speed.SpeedBar(
            title=ARM_TITLES[arm.name],
            value=tokens_per_second(found.tokens_per_second),
            strong=arm.name == "predicted",
            speeds=found,
            rounds=tuple(round_speeds(bench.samples, arm.name, phase).values()),
        )
        for arm in arms_in_order(bench)
        if (found := arm.decode if phase == "decode" else arm.prompt) is not None
    ]


def _spoken(bar: speed.SpeedBar) -> str:
    low, high = map(tokens_per_second, bar.speeds.quartiles)
    return f"{bar.title} {bar.value} (quartiles {low} to {high})"


def layer_pictures(run: Run, name: str, ends: Scales) -> list[Picture]:
    """Draw each layer's sparsity, recall and density."""
    layers = run.layers
    if not layers:
        return []
    titles = {
        "activation_sparsity": "Activation sparsity, %",
        "activation_recall": "Recall, %",
        "predicted_sparsity": "Neurons computed, %",
    }
    pictures = []
    for number, (key, title) in enumerate(titles.items()):
        if key == "predicted_sparsity":
            figure = _figure(2.3, predictors.computed_bars, layers, ends.density)
        else:
            figure = _figure(2.3, predictors.share_bars, layers, key)
        pictures.append(_picture(figure, f"{name}l{number}", _layer_label(run, key), title))
    return pictures


def _layer_label(run: Run, key: str) -> str:
    values = [getattr(layer, key) for layer in run.layers]
    return (
        f"Bars. {key.replace('_', ' ').capitalize()} of {len(values)} layers: from "
        f"{per_cent(min(values))} to {per_cent(max(values))} per cent; values in the table."
    )


def search_pictures(run: Run, name: str) -> list[Picture]:
    """Draw what the search explored."""
    points = run.points
    if not points:
        return []
    chosen = [
        f" Chosen: {per_cent(point.ffn_bytes_ratio)} per cent of the bytes at a gap of "
        f"{per_cent(point.ppl_gap or 0.0)} per cent."
        for point in points
        if point.chosen
    ]
    label = f"Perplexity gap against FFN bytes of {len(points)} settings.{''.join(chosen)}"
    figure = _figure(2.7, predictors.search_front, points)
    return [_picture(figure, f"{name}p", label, "Perplexity gap, %")]


def hot_pictures(run: Run, name: str) -> list[Picture]:
    """Draw the share of activations that the most often active neurons make."""
    hot = run.hot
    if hot is None:
        return []
    shares = zip(hot.neuron_share, hot.activation_share, strict=True)
    tenth = next((share for neurons, share in shares if neurons >= 0.1 - 1e-9), 1.0)
    label = f"Curve. The most often active tenth makes {per_cent(tenth)} per cent of activations."
    figure = _figure(2.7, predictors.hot_curve, hot)
    return [_picture(figure, f"{name}h", label, "Activations captured, %")]


def memory_pictures(run: Run, name: str, ends: Scales) -> list[Picture]:
    """Draw the bytes on each device."""
    devices = () if run.bench is None else _devices(run.bench)
    if not devices:
        return []
    sums = (f"{device.name} {size(sum(device.bytes.values()))}" for device in devices)
    label = f"Stacked bars. Memory by device: {'; '.join(sums)}; parts in the table."
    height = speed.EDGE + 0.18 + speed.ROW * len(devices)
    figure = _figure(height, speed.memory_bars, devices, ends.memory)
    return [_picture(figure, f"{name}m", label, "")]


def _devices(bench: Bench) -> tuple[Device, ...]:
    return () if bench.placement is None else bench.placement.devices


def density_pictures(run: Run, name: str) -> list[Picture]:
    """Draw speed against density."""
    if run.density is None:
        return []
    points, shape = run.density.points, run.density.shape
    label = f"Curves. Tokens per second at {len(points)} predicted densities."
    title = (
        f"{shape.n_layers} layers, d_model {shape.d_model}, d_ff {shape.d_ff}, "
        f"rank {shape.rank}; threads: {run.density.threads}"
    )
    return [_picture(speed.density_figure(points, WIDTH), f"{name}d", label, title)]


def budget_pictures(run: Run, name: str) -> list[Picture]:
    """Draw speed against VRAM, one picture a step of the stage `hybrid`."""
    if run.card is None:
        return []
    label = "Curves. Tokens per second of PowerInfer and dense engines at several VRAM budgets."
    return [
        _picture(card.budget_figure(timed, WIDTH), f"{name}c{number}", label, step)
        for number, (step, timed) in enumerate(card.budgets_of(run.card.figures).items())
    ]


def answer_pictures(found: Evaluation, name: str) -> list[Picture]:
    """Draw the scores, and the answers that changed."""
    scores, changed, arms = score_groups(found), changed_groups(found), len(found.arms)
    pictures = []
    if scores:
        label = f"Bars. Scores of {arms} arms in {len(scores)} tasks; values in the table."
        figure = evaluation.score_figure(scores, arms, WIDTH)
        pictures.append(_picture(figure, f"{name}a0", label, "Score, %"))
    if changed:
        most = max(bar.percent for group in changed for bar in group.bars)
        label = f"Bars. Changed answers, at most {most:.2f} per cent; values in the table."
        figure = evaluation.changed_figure(changed, arms, WIDTH)
        pictures.append(_picture(figure, f"{name}a1", label, "Changed answers, %"))
    return pictures


def _figure(height: float, draw: Callable[..., None], *what: object) -> Figure:
    """Return a figure of one panel."""
    figure = new_figure(WIDTH, height)
    axes: Axes = figure.subplots()
    draw(axes, *what)
    return figure


def _picture(figure: Figure, name: str, label: str, title: str) -> Picture:
    return Picture(svg=Markup(inline_svg(figure, name, label)), title=title)


@contextmanager
def page_style() -> Iterator[None]:
    """Draw for the page: no ground of its own, and text as text."""
    import matplotlib

    with style():
        matplotlib.rcParams.update(_PAGE_STYLE)
        yield


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an `svg` element.

    Args:
        figure: drawn in `page_style`, with no text in it that comes from a result.
        name: of letters and digits, unlike that of every other picture of the page: identifiers
            in a page are shared by all its pictures.
        label: what the picture shows, for those who cannot see it; escaped here.
    """
    arrange(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    drawn = buffer.getvalue()
    opening, body = re.split(r"(?<=>)", drawn[drawn.index("<svg") :], maxsplit=1)
    view = re.findall(r'viewBox="([^"]*)"', opening)[0]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = _renamed(body.replace("xlink:href", "href"), name)
    body = re.sub(r' fill="(#[0-9a-f]{6})"', r' style="fill: \1"', body)  # of hatches
    body = re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda found: _variable(found[0]), body)
    return f'<svg viewBox="{view}" role="img" aria-label="{escape(visible(label))}">{body.strip()}'


def _renamed(body: str, name: str) -> str:
    """Keep the identifiers that something refers to, under names of this picture's own."""
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', body))
    body = re.sub(
        r' id="([\w.-]+)"',
        lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "",
        body,
    )
    return re.sub(r'(url\(|href=")#', rf"\1#{name}-", body)


def _variable(colour: str) -> str:
    return f"var(--{COLOURS[colour][0]})" if colour in COLOURS else colour
