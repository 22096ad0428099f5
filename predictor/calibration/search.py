"""The price of a computed neuron that keeps a model within a bound, and the ranks for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from common.errors import PredictorError
from predictor.calibration.operating_point import Curves, OperatingPoint
from predictor.calibration.predicted_model import Quality

_LOWEST_PRICE, _HIGHEST_PRICE = 1e-12, 1e3
_BISECTIONS = 40
_MEASUREMENTS = 5
_CLOSE = 0.9
"""A measured divergence of this share of the bound is near enough."""

_ERRORS = 2
"""Standard errors by which a measured growth may exceed the bound."""

_TYPICAL = 0.5
"""Divergence per `OperatingPoint.error`, summed over layers, before it was measured: 0.36 to 0.48
in all but the first layer of the testbed (docs/decisions/0007)."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """An operating point that was tried.

    Attributes:
        price: of a computed neuron.
        ffn_bytes_ratio: mean over layers, by the rows that thresholds were chosen on.
        ppl_dense: the model's own perplexity, None where not measured; the next three likewise.
        ppl_sparse: with predictors in place.
        ppl_gap: measured growth of perplexity.
        kl_divergence: see `Quality`.
        standard_error: likewise.
        chosen: whether the predictors have it.
    """

    price: float
    ffn_bytes_ratio: float
    ppl_dense: float | None = None
    ppl_sparse: float | None = None
    ppl_gap: float | None = None
    kl_divergence: float | None = None
    standard_error: float | None = None
    chosen: bool = False

    def as_dict(self) -> dict[str, float | bool | None]:
        """Return it ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Priced:
    """All layers at one price.

    Attributes:
        points: layer number to operating point.
        sign: of all thresholds, 1 or -1.
        ffn_bytes_ratio: mean over layers.
        error: sum over layers.
    """

    points: Mapping[int, OperatingPoint]
    sign: int
    ffn_bytes_ratio: float
    error: float


def at_price(curves: Mapping[int, Curves], costs: Mapping[int, float], price: float) -> Priced:
    """Put all layers at one price, with thresholds of the sign that costs less.

    Args:
        curves: of each layer.
        costs: bytes of each layer's predictor relative to its FFN.
        price: of a computed neuron.
    """
    cheapest = None
    for sign in (1, -1):
        points = {layer: curve.at(price, sign) for layer, curve in curves.items()}
        error = sum(point.error for point in points.values())
        computed = sum(point.density * len(point.steps) for point in points.values())
        if cheapest is None or error + price * computed < cheapest[0]:
            ratios = [point.density + costs[layer] for layer, point in points.items()]
            priced = Priced(points, sign, sum(ratios) / len(ratios), error)
            cheapest = error + price * computed, priced
    assert cheapest is not None
    return cheapest[1]


def highest_price(fits: Callable[[float], bool]) -> float:
    """Return the highest price that fits, or the lowest of all; `fits` turns false once."""
    low, high = math.log(_LOWEST_PRICE), math.log(_HIGHEST_PRICE)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(math.exp(middle)) else (low, middle)
    return math.exp(low)


def _error_within(
    curves: Mapping[int, Curves], costs: Mapping[int, float], error: float
) -> Callable[[float], bool]:
    return lambda price: at_price(curves, costs, price).error <= error


def price_for_bytes(
    curves: Mapping[int, Curves], costs: Mapping[int, float], bound: float
) -> tuple[float, list[Point]]:
    """Return the lowest price at which the mean FFN bytes ratio is within the bound.

    Raises:
        PredictorError: the predictors alone take more.
    """
    price = highest_price(lambda p: at_price(curves, costs, p).ffn_bytes_ratio > bound)
    price *= 1.0 + 1e-9  # the other side of the last bisection
    while (ratio := at_price(curves, costs, price).ffn_bytes_ratio) > bound:
        if price > _HIGHEST_PRICE:
            raise PredictorError(
                f"--ffn-bytes {bound:g} is out of reach: with hardly a neuron computed the ratio "
                f"is {ratio:.4f}; lower --rank or allow more"
            )
        price *= 1.01
    return price, [Point(price=price, ffn_bytes_ratio=ratio, chosen=True)]


def price_for_gap(
    curves: Mapping[int, Curves],
    costs: Mapping[int, float],
    bound: float,
    measure: Callable[[Priced], Quality],
) -> tuple[float, list[Point]]:
    """Return the highest price found that keeps the growth of perplexity within the bound.

    The expected growth, the divergence, must be within it, and the measured one must not contradict
    that by more than two standard errors: alone it scatters too much to be searched by. The growth
    is near enough to a power of the error that curves predict, mostly the first, for a secant on
    logarithms to need few measurements.

    Args:
        curves: of each layer.
        costs: bytes of each layer's predictor relative to its FFN.
        bound: largest growth of perplexity, a fraction.
        measure: runs the model at an operating point.

    Raises:
        PredictorError: out of reach; it names the best.
    """
    allowed = math.log1p(bound)
    aim = (0.5 + 0.5 * _CLOSE) * allowed
    error = allowed / _TYPICAL
    tried: dict[float, Point] = {}
    seen: list[tuple[float, float]] = []
    best: float | None = None
    for _ in range(_MEASUREMENTS):
        price = highest_price(_error_within(curves, costs, error))
        if price in tried:
            break
        priced = at_price(curves, costs, price)
        quality = measure(priced)
        tried[price] = Point(
            price=price,
            ffn_bytes_ratio=priced.ffn_bytes_ratio,
            ppl_dense=quality.ppl_dense,
            ppl_sparse=quality.ppl_sparse,
            ppl_gap=quality.ppl_gap,
            kl_divergence=quality.kl_divergence,
            standard_error=quality.standard_error,
        )
        least = math.log1p(quality.ppl_gap) - _ERRORS * quality.standard_error
        growth = max(quality.kl_divergence, least, 1e-12)
        if growth <= allowed and (best is None or price > best):
            best = price
        if _CLOSE * allowed <= growth <= allowed:
            break
        seen.append((max(priced.error, 1e-30), growth))
        error = error_for(seen, aim)
    points = sorted(tried.values(), key=lambda point: point.price)
    if best is None:
        nearest = points[0]
        raise PredictorError(
            f"--max-ppl-gap {bound:g} is out of reach: the best has a gap of {nearest.ppl_gap:.3g} "
            f"and a divergence of {nearest.kl_divergence:.3g} at FFN bytes "
            f"{nearest.ffn_bytes_ratio:.4f}; raise --rank or allow more"
        )
    return best, [Point(**{**vars(p), "chosen": p.price == best}) for p in points]


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


def best_ranks(
    scouts: Mapping[int, Mapping[int, Curves]],
    cost: Callable[[int], float],
    d_ff: int,
    enough: Callable[[float, float], bool],
    weight: float = 1.0,
) -> dict[int, int]:
    """Choose the rank of each layer.

    Args:
        scouts: layer number, rank to curves of a quickly trained predictor.
        cost: bytes of a predictor of some rank relative to the FFN.
        d_ff: neurons of a layer.
        enough: tells, of a mean FFN bytes ratio and an error summed over layers, whether the price
            may still rise.
        weight: what a predictor's byte costs relative to one of a neuron, in the choice alone.

    Returns:
        Layer number to rank.
    """

    def choose(price: float) -> dict[int, tuple[int, OperatingPoint]]:
        """Let every layer take what costs least, whatever the others' sign."""
        chosen = {}
        for layer, ranks in scouts.items():
            options = [(r, curve.at(price, s)) for r, curve in ranks.items() for s in (1, -1)]
            chosen[layer] = min(
                options,
                key=lambda o: o[1].error + price * d_ff * (weight * cost(o[0]) + o[1].density),
            )
        return chosen

    def fits(price: float) -> bool:
        chosen = choose(price).values()
        ratio = sum(cost(rank) + point.density for rank, point in chosen) / len(chosen)
        return enough(ratio, sum(point.error for _, point in chosen))

    return {layer: rank for layer, (rank, _) in choose(highest_price(fits)).items()}


def within_gap(bound: float) -> Callable[[float, float], bool]:
    """Return the test of `best_ranks` for a bound on the growth of perplexity."""
    return lambda ratio, error: error * _TYPICAL <= math.log1p(bound)


def within_bytes(bound: float) -> Callable[[float, float], bool]:
    """Return the test of `best_ranks` for a bound on the mean FFN bytes ratio."""
    return lambda ratio, error: ratio > bound


def candidate_ranks(d_model: int, multiple: int) -> Sequence[int]:
    """Return powers of two times `multiple`, up to a quarter of d_model."""
    ranks = [multiple]
    while 2 * ranks[-1] <= d_model // 4:
        ranks.append(2 * ranks[-1])
    return ranks
