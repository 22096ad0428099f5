"""The rank and type of each layer's predictor, by the price that a bound allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from common.element_types import ELEMENT_TYPES
from predictor.size import Size
from predictor.thresholds.curves import Curves
from predictor.thresholds.price import SIGNS, is_dense, price_bracket


@dataclass(frozen=True)
class _Option:
    size: Size
    error: float
    density: float


def best_sizes(
    scouts: Mapping[int, Mapping[Size, Curves]],
    cost: Callable[[Size], float],
    d_ff: int,
    enough: Callable[[float, float], bool],
    weight: float = 1.0,
    least: float = math.inf,
) -> dict[int, Size]:
    """Choose the size of each layer's predictor.

    Ranks halfway between two that were tried are judged by both: what a predictor misses and
    computes at a price falls about evenly with the logarithm of its rank.

    Args:
        scouts: layer number, size to curves of a quickly trained predictor.
        cost: bytes of a predictor of some size relative to the FFN.
        d_ff: neurons of a layer.
        enough: tells, of a mean FFN bytes ratio and an error summed over layers, whether the price
            may still rise.
        weight: what a predictor's byte costs relative to one of a neuron, in the choice alone.
        least: bytes of a dense layer's predictor relative to the FFN, infinite where none may be.

    Returns:
        Layer number to size, also where a layer is better dense at the price of this choice:
        thresholds may be chosen at another one.
    """

    def choose(price: float) -> dict[int, _Option]:
        """Let every layer take what costs least, whatever the others' sign."""
        return {
            layer: min(
                _options(curves, price),
                key=lambda o: o.error + price * d_ff * (weight * cost(o.size) + o.density),
            )
            for layer, curves in scouts.items()
        }

    def spent(option: _Option, price: float) -> tuple[float, float]:
        """Return FFN bytes ratio and error of a layer that may be dense."""
        ratio = cost(option.size) + option.density
        weighted = weight * cost(option.size) + option.density
        dense = is_dense(weighted, option.error, weight * least, price * d_ff)
        return (1 + least, 0.0) if dense else (ratio, option.error)

    def fits(price: float) -> bool:
        chosen = [spent(option, price) for option in choose(price).values()]
        return enough(sum(ratio for ratio, _ in chosen) / len(chosen), sum(e for _, e in chosen))

    return {layer: each.size for layer, each in choose(price_bracket(fits)[0]).items()}


def _options(curves: Mapping[Size, Curves], price: float) -> Iterator[_Option]:
    """Yield what each size leads to at a price, for thresholds of either sign."""
    for sign in SIGNS:
        before: _Option | None = None
        for size, curve in sorted(curves.items(), key=lambda item: item[0]):
            point = curve.at(price, sign)
            option = _Option(size, point.error, point.density)
            if before is not None and (between := _between(before.size, size)) is not None:
                yield _interpolated(before, option, between)
            yield option
            before = option


def _between(low: Size, high: Size) -> Size | None:
    """Return the size halfway, if both are of one type and it allows that rank."""
    rank, rest = divmod(low.rank + high.rank, 2)
    allowed = not rest and low.kind == high.kind and rank not in (low.rank, high.rank)
    multiple = ELEMENT_TYPES[low.kind].row_multiple
    return Size(low.kind, rank) if allowed and rank % multiple == 0 else None


def _interpolated(low: _Option, high: _Option, size: Size) -> _Option:
    share = math.log(size.rank / low.size.rank) / math.log(high.size.rank / low.size.rank)
    return _Option(
        size,
        low.error + share * (high.error - low.error),
        low.density + share * (high.density - low.density),
    )
