"""Thresholds for every neuron at the price that a bound allows, and ranks by the same price."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from common.errors import PredictorError
from common.typed_json import parse, plain
from predictor.artifact import PredictorArtifact
from predictor.dense_layer import dense_metrics
from predictor.module import Predictor
from predictor.thresholds.curves import LayerCurves, OperatingPoint
from predictor.thresholds.predicted_model import PredictedModel, Quality
from predictor.thresholds.price import Layers, Priced, fewest_bytes, least_error
from results.predictors import SearchPoint

_MEASUREMENTS = 5
_GLANCED = 4
"""Windows for each that the first look takes, which no result rests on."""

_CLOSE = 0.9
"""A measured divergence of this share of the bound is near enough."""

_RAISED, _MORE = 3, 10.0
"""How often an error is raised that lets every layer be dense, and by what factor."""

_ERRORS = 2
"""Standard errors by which a measured growth may exceed the bound."""

_TYPICAL = 0.5
"""Divergence per `OperatingPoint.error`, summed over layers, before it was measured: 0.36 to 0.48
in all but the first layer of the testbed (docs/decisions/0007)."""


class Measure(Protocol):
    """Runs a model with an artifact's predictors."""

    def __call__(self, priced: Priced, *, every: int) -> Quality:
        """Return what predictors do at an operating point, on one of `every` windows."""


@contextmanager
def measured_by(artifact: PredictorArtifact, model: PredictedModel) -> Iterator[Measure]:
    """Let a model in this process be run."""

    def measure(priced: Priced, *, every: int) -> Quality:
        predictors = folded(artifact, {n: p.thresholds for n, p in priced.points.items()})
        return model.quality(predictors, float(priced.sign), every=every)

    yield measure


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What thresholds must keep to; one of the two is given.

    Attributes:
        max_ppl_gap: largest growth of perplexity, a fraction.
        ffn_bytes: largest mean FFN bytes ratio.
    """

    max_ppl_gap: float | None = None
    ffn_bytes: float | None = None

    def __post_init__(self) -> None:
        """Hold what callers rely on."""
        assert (self.max_ppl_gap is None) != (self.ffn_bytes is None)

    def leaves_room(self, share: float = 1.0) -> Callable[[float, float], bool]:
        """Return the test of `best_ranks` for some of the layers.

        Args:
            share: of the model's layers, which may use that share of a growth of perplexity.
        """
        if (most := self.ffn_bytes) is not None:
            return lambda ratio, error: ratio > most
        assert self.max_ppl_gap is not None
        growth = math.log1p(self.max_ppl_gap * share)
        return lambda ratio, error: error * _TYPICAL <= growth


def choose_thresholds(
    artifact: PredictorArtifact,
    bound: Bound,
    ffn_matrices: int,
    open_measure: Callable[[], AbstractContextManager[Measure]],
) -> None:
    """Choose the thresholds of all layers, store them with their metrics and what was tried.

    Args:
        artifact: complete, with curves.
        bound: what to keep to.
        ffn_matrices: matrices of an FFN.
        open_measure: loads the model; called only to keep to a gap.

    Raises:
        PredictorError: the bound is out of reach; layers stay as they were.
    """
    header = artifact.header
    measured = {n: LayerCurves.read(artifact.curves(n)) for n in range(header.n_layers)}
    layers = Layers(
        {n: layer.train for n, layer in measured.items()},
        {n: artifact.predictor_share(artifact.trained_size(n), ffn_matrices) for n in measured},
        artifact.predictor_share(artifact.dense_size, ffn_matrices),
    )
    if bound.ffn_bytes is not None:
        chosen, points = price_for_bytes(layers, bound.ffn_bytes)
    else:
        assert bound.max_ppl_gap is not None
        with open_measure() as measure:
            whole, glance = (partial(measure, every=every) for every in (1, _GLANCED))
            chosen, points = price_for_gap(layers, bound.max_ppl_gap, whole, glance)
    for n, layer in measured.items():
        point = chosen.points.get(n)
        artifact.layers[n] = _metrics(layer, point, layers.costs[n], layers.least)
    artifact.search = [_finite(point) for point in points]
    thresholds = {n: point.thresholds for n, point in chosen.points.items()}
    artifact.set_thresholds(thresholds, chosen.sign, chosen.dense)


def _metrics(
    layer: LayerCurves, point: OperatingPoint | None, cost: float, least: float
) -> dict[str, float]:
    """Return a layer's metrics at an operating point; of a dense layer without one."""
    curves = layer.holdout
    if point is None:
        sparsity = 1 - layer.active / (curves.rows * curves.thresholds.shape[1])
        return {**dense_metrics(sparsity, least), "ffn_output_error": 0.0}
    metrics = curves.counts(point.steps, layer.active).metrics_with(cost)
    return {**metrics, "ffn_output_error": curves.choose(point.steps).error}


def leave_out_unpaid(artifact: PredictorArtifact, ffn_matrices: int) -> None:
    """Have those layers dense whose predictors save no bytes, where no bound sets a price.

    Args:
        artifact: complete; its layers' metrics follow.
        ffn_matrices: matrices of an FFN.
    """
    least = artifact.predictor_share(artifact.dense_size, ffn_matrices)
    for layer, metrics in artifact.layers.items():
        ratio = metrics["ffn_bytes_ratio"]
        if ratio >= 1 and layer not in artifact.dense:
            artifact.dense[layer] = ratio
            artifact.layers[layer] = dense_metrics(metrics["activation_sparsity"], least)
    artifact.write_header()


def _finite(point: SearchPoint) -> SearchPoint:
    """Return a point without numbers that JSON does not have."""
    numbers = {k: v for k, v in vars(point).items() if isinstance(v, float)}
    lost = {k: None for k, v in numbers.items() if not math.isfinite(v)}
    return parse(SearchPoint, plain(point) | lost)


def folded(
    artifact: PredictorArtifact, thresholds: Mapping[int, torch.Tensor]
) -> dict[int, Predictor]:
    """Return the predictors of layers with an operating point's thresholds folded in.

    Args:
        artifact: it holds them.
        thresholds: layer number to (d_ff,) float32.
    """
    return {
        n: artifact.layer(n, folded=False).folded(each).predictor()
        for n, each in thresholds.items()
    }


def price_for_bytes(layers: Layers, bound: float) -> tuple[Priced, list[SearchPoint]]:
    """Return the operating point that misses least at a mean FFN bytes ratio within the bound.

    Raises:
        PredictorError: the predictors alone take more.
    """
    priced = least_error(layers, bound)
    if priced.ffn_bytes_ratio > bound:
        raise PredictorError(
            f"--ffn-bytes {bound:g} is out of reach: with hardly a neuron computed the ratio "
            f"is {priced.ffn_bytes_ratio:.4f}",
            "lower --rank or allow more",
        )
    ratio = priced.ffn_bytes_ratio
    return priced, [SearchPoint(price=priced.price, ffn_bytes_ratio=ratio, chosen=True)]


def price_for_gap(
    layers: Layers,
    bound: float,
    measure: Callable[[Priced], Quality],
    glance: Callable[[Priced], Quality] | None = None,
) -> tuple[Priced, list[SearchPoint]]:
    """Return the operating point of fewest bytes that was found within a growth of perplexity.

    The expected growth, the divergence, must be within it, and the measured one must not contradict
    that by more than two standard errors: alone it scatters too much to be searched by. The growth
    is near enough to a power of the error that curves predict, mostly the first, for a secant on
    logarithms to need few measurements.

    Args:
        layers: all of them.
        bound: largest growth of perplexity, a fraction.
        measure: runs the model at an operating point.
        glance: measures on less text, to begin near the end; None begins at what is typical.

    Raises:
        PredictorError: out of reach; it names the best.
    """
    allowed = math.log1p(bound)
    error = _first_error(layers, allowed, glance)
    tried: dict[tuple[float, int], SearchPoint] = {}
    seen: list[tuple[float, float]] = []
    best: Priced | None = None
    for _ in range(_MEASUREMENTS):
        priced = fewest_bytes(layers, error)
        if (priced.price, priced.sign) in tried:
            break
        quality = measure(priced)
        tried[priced.price, priced.sign] = SearchPoint(
            price=priced.price,
            ffn_bytes_ratio=priced.ffn_bytes_ratio,
            ppl_gap=quality.ppl_gap,
            **vars(quality),
        )
        growth = _growth(quality)
        if growth <= allowed and (best is None or priced.ffn_bytes_ratio < best.ffn_bytes_ratio):
            best = priced
        if _CLOSE * allowed <= growth <= allowed or not priced.error:
            break
        seen.append(_seen(priced, growth))
        error = error_for(seen, _aim(allowed))
    if best is None:
        nearest = max(tried.values(), key=lambda point: point.ffn_bytes_ratio)
        raise PredictorError(
            f"--max-ppl-gap {bound:g} is out of reach: the best has a gap of {nearest.ppl_gap:.3g} "
            f"and a divergence of {nearest.kl_divergence:.3g} at FFN bytes "
            f"{nearest.ffn_bytes_ratio:.4f}",
            "raise --rank or allow more",
        )
    tried[best.price, best.sign] = replace(tried[best.price, best.sign], chosen=True)
    return best, sorted(tried.values(), key=lambda point: point.ffn_bytes_ratio)


def _first_error(
    layers: Layers, allowed: float, glance: Callable[[Priced], Quality] | None
) -> float:
    """Return the error to begin at: what is typical of a growth, or what a glance makes of it.

    What is typical may miss nothing, if every layer is dense up to an error that is not.
    """
    error = allowed / _TYPICAL
    for _ in range(_RAISED):
        priced = fewest_bytes(layers, error)
        if priced.error:
            break
        error *= _MORE
    if glance is None or not priced.error or not math.isfinite(growth := _growth(glance(priced))):
        return error
    return error_for([_seen(priced, growth)], _aim(allowed))


def _aim(allowed: float) -> float:
    return (0.5 + 0.5 * _CLOSE) * allowed


def _growth(quality: Quality) -> float:
    """Return the growth to be expected, or what a measured one that contradicts it leaves."""
    least = math.log1p(quality.ppl_gap) - _ERRORS * quality.standard_error
    return max(quality.kl_divergence, least, 1e-12)


def _seen(priced: Priced, growth: float) -> tuple[float, float]:
    return max(priced.error, 1e-30), growth


def error_for(seen: Sequence[tuple[float, float]], growth: float) -> float:
    """Return the error at which `growth` is to be expected, by the last two measurements.

    Args:
        seen: (error, growth) of measurements, all above zero; one stands for proportion.
        growth: wanted.
    """
    error, found = seen[-1]
    power = 1.0
    if len(seen) > 1 and seen[-2][0] != error and seen[-2][1] != found:
        before, grown = seen[-2]
        power = math.log(found / grown) / math.log(error / before)
    # Noise of the measured growth may turn the slope round.
    return float(error * (growth / found) ** (1 / min(max(power, 0.25), 2.0)))
