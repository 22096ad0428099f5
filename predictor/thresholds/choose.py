"""Thresholds for every neuron at the price that a bound allows, and ranks by the same price."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from common.element_types import ELEMENT_TYPES
from common.errors import PredictorError
from common.typed_json import parse, plain
from predictor.artifact import PredictorArtifact
from predictor.module import Predictor
from predictor.thresholds.curves import Curves, LayerCurves, OperatingPoint
from predictor.thresholds.predicted_model import PredictedModel, Quality
from results.predictors import SearchPoint

_LOWEST_PRICE, _HIGHEST_PRICE = 1e-12, 1e3
_BISECTIONS = 40
SIGNS = (1, -1)
_MEASUREMENTS = 5
_GLANCED = 4
"""Windows for each that the first look takes, which no result rests on."""

_CLOSE = 0.9
"""A measured divergence of this share of the bound is near enough."""

_ERRORS = 2
"""Standard errors by which a measured growth may exceed the bound."""

_TYPICAL = 0.5
"""Divergence per `OperatingPoint.error`, summed over layers, before it was measured: 0.36 to 0.48
in all but the first layer of the testbed (docs/decisions/0007)."""


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
    open_model: Callable[[], PredictedModel],
) -> None:
    """Choose the thresholds of all layers, store them with their metrics and what was tried.

    Args:
        artifact: complete, with curves.
        bound: what to keep to.
        ffn_matrices: matrices of an FFN.
        open_model: loads the model; called only to keep to a gap.

    Raises:
        PredictorError: the bound is out of reach; layers stay as they were.
    """
    header = artifact.header
    layers = {n: LayerCurves.read(artifact.curves(n)) for n in range(header.n_layers)}
    curves = {n: layer.train for n, layer in layers.items()}
    sizes = {"d_model": header.d_model, "d_ff": header.d_ff, "ffn_matrices": ffn_matrices}
    ffn = ELEMENT_TYPES[header.outtype]
    stored = {n: ELEMENT_TYPES[artifact.kind(n)] for n in layers}
    costs = {n: stored[n].relative(artifact.rank(n), ffn=ffn, **sizes) for n in layers}
    if bound.ffn_bytes is not None:
        chosen, points = price_for_bytes(curves, costs, bound.ffn_bytes)
    else:
        assert bound.max_ppl_gap is not None
        model = open_model()

        def measure(priced: Priced, every: int = 1) -> Quality:
            predictors = folded(artifact, priced.points)
            return model.quality(predictors, float(priced.sign), every=every)

        glance = partial(measure, every=_GLANCED)
        chosen, points = price_for_gap(curves, costs, bound.max_ppl_gap, measure, glance)
    for n, point in chosen.points.items():
        counts = layers[n].holdout.counts(point.steps, layers[n].active)
        rank, width = stored[n].padded(artifact.rank(n)), stored[n].width / ffn.width
        metrics = counts.metrics(rank=rank, predictor_width=width, **sizes)
        error = layers[n].holdout.choose(point.steps).error
        artifact.layers[n] = {**metrics, "ffn_output_error": error}
    artifact.search = [_finite(point) for point in points]
    thresholds = {n: point.thresholds for n, point in chosen.points.items()}
    artifact.set_thresholds(thresholds, chosen.sign)


def _finite(point: SearchPoint) -> SearchPoint:
    """Return a point without numbers that JSON does not have."""
    numbers = {k: v for k, v in vars(point).items() if isinstance(v, float)}
    lost = {k: None for k, v in numbers.items() if not math.isfinite(v)}
    return parse(SearchPoint, plain(point) | lost)


def folded(
    artifact: PredictorArtifact, points: Mapping[int, OperatingPoint]
) -> dict[int, Predictor]:
    """Return every layer's predictor with the thresholds of an operating point folded in."""
    return {
        n: artifact.layer(n, folded=False).folded(point.thresholds).predictor()
        for n, point in points.items()
    }


@dataclass(frozen=True, kw_only=True)
class Priced:
    """All layers at one price.

    Attributes:
        price: of a computed neuron.
        points: layer number to operating point.
        sign: of all thresholds, 1 or -1.
        ffn_bytes_ratio: mean over layers.
        error: sum over layers.
    """

    price: float
    points: Mapping[int, OperatingPoint]
    sign: int
    ffn_bytes_ratio: float
    error: float


def at_price(
    curves: Mapping[int, Curves], costs: Mapping[int, float], price: float, sign: int
) -> Priced:
    """Put all layers at one price.

    Args:
        curves: of each layer.
        costs: bytes of each layer's predictor relative to its FFN.
        price: of a computed neuron.
        sign: of all thresholds, 1 or -1.
    """
    points = {layer: curve.at(price, sign) for layer, curve in curves.items()}
    ratios = [point.density + costs[layer] for layer, point in points.items()]
    return Priced(
        price=price,
        points=points,
        sign=sign,
        ffn_bytes_ratio=sum(ratios) / len(ratios),
        error=sum(point.error for point in points.values()),
    )


def price_bracket(holds: Callable[[float], bool]) -> tuple[float, float]:
    """Return the prices between which `holds` turns false once, hardly apart.

    If it always holds the second is the highest price there is, if it never does the first is the
    lowest.
    """
    low, high = math.log(_LOWEST_PRICE), math.log(_HIGHEST_PRICE)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(math.exp(middle)) else (low, middle)
    return math.exp(low), math.exp(high)


def _crossing(
    curves: Mapping[int, Curves],
    costs: Mapping[int, float],
    sign: int,
    holds: Callable[[Priced], bool],
) -> tuple[Priced, Priced]:
    """Return the operating points on both sides of the price at which `holds` turns false."""
    option = partial(at_price, curves, costs, sign=sign)
    last, first = price_bracket(lambda price: holds(option(price)))
    return option(last), option(first)


def fewest_bytes(curves: Mapping[int, Curves], costs: Mapping[int, float], error: float) -> Priced:
    """Return what keeps an error in the fewest bytes, or else comes nearest to it."""
    found = [_crossing(curves, costs, s, lambda priced: priced.error <= error)[0] for s in SIGNS]
    return min(found, key=lambda priced: (max(priced.error, error), priced.ffn_bytes_ratio))


def least_error(
    curves: Mapping[int, Curves], costs: Mapping[int, float], ffn_bytes: float
) -> Priced:
    """Return what misses least within a mean FFN bytes ratio, or else comes nearest to it."""
    found = [
        _crossing(curves, costs, s, lambda priced: priced.ffn_bytes_ratio > ffn_bytes)[1]
        for s in SIGNS
    ]
    return min(found, key=lambda priced: (max(priced.ffn_bytes_ratio, ffn_bytes), priced.error))


def price_for_bytes(
    curves: Mapping[int, Curves], costs: Mapping[int, float], bound: float
) -> tuple[Priced, list[SearchPoint]]:
    """Return the operating point that misses least at a mean FFN bytes ratio within the bound.

    Raises:
        PredictorError: the predictors alone take more.
    """
    priced = least_error(curves, costs, bound)
    if priced.ffn_bytes_ratio > bound:
        raise PredictorError(
            f"--ffn-bytes {bound:g} is out of reach: with hardly a neuron computed the ratio "
            f"is {priced.ffn_bytes_ratio:.4f}",
            "lower --rank or allow more",
        )
    ratio = priced.ffn_bytes_ratio
    return priced, [SearchPoint(price=priced.price, ffn_bytes_ratio=ratio, chosen=True)]


def price_for_gap(
    curves: Mapping[int, Curves],
    costs: Mapping[int, float],
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
        curves: of each layer.
        costs: bytes of each layer's predictor relative to its FFN.
        bound: largest growth of perplexity, a fraction.
        measure: runs the model at an operating point.
        glance: measures on less text, to begin near the end; None begins at what is typical.

    Raises:
        PredictorError: out of reach; it names the best.
    """
    allowed = math.log1p(bound)
    aim = (0.5 + 0.5 * _CLOSE) * allowed
    error = allowed / _TYPICAL
    if glance is not None:
        priced = fewest_bytes(curves, costs, error)
        error = error_for([_seen(priced, _growth(glance(priced)))], aim)
    tried: dict[tuple[float, int], SearchPoint] = {}
    seen: list[tuple[float, float]] = []
    best: Priced | None = None
    for _ in range(_MEASUREMENTS):
        priced = fewest_bytes(curves, costs, error)
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
        if _CLOSE * allowed <= growth <= allowed:
            break
        seen.append(_seen(priced, growth))
        error = error_for(seen, aim)
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
