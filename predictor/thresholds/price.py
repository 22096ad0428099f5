"""One price of a computed neuron for all layers: what each computes and misses at it.

At a price a layer is dense (`predictor.dense_layer`) where its predictor saves no bytes, or fewer
than what it misses is worth. So layers that miss much for little leave their errors to others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from predictor.thresholds.curves import Curves, OperatingPoint

_LOWEST_PRICE, _HIGHEST_PRICE = 1e-12, 1e3
_BISECTIONS = 40
SIGNS = (1, -1)


@dataclass(frozen=True, kw_only=True)
class Priced:
    """All layers at one price.

    Attributes:
        price: of a computed neuron.
        points: layer number to operating point, of layers with a predictor.
        dense: number of a dense layer to the FFN bytes ratio that it has with its predictor.
        sign: of all thresholds, 1 or -1.
        ffn_bytes_ratio: mean over layers.
        error: sum over layers.
    """

    price: float
    points: Mapping[int, OperatingPoint]
    dense: Mapping[int, float]
    sign: int
    ffn_bytes_ratio: float
    error: float


@dataclass(frozen=True)
class Layers:
    """All layers of a model, ready to be priced.

    Attributes:
        curves: of each layer.
        costs: bytes of each layer's predictor relative to its FFN.
        least: those of a dense layer's predictor; infinite where no layer may be dense.
    """

    curves: Mapping[int, Curves]
    costs: Mapping[int, float]
    least: float = math.inf

    def at(self, price: float, sign: int) -> Priced:
        """Put all layers at one price.

        Args:
            price: of a computed neuron.
            sign: of all thresholds, 1 or -1.
        """
        found = {layer: curve.at(price, sign) for layer, curve in self.curves.items()}
        ratios = {layer: point.density + self.costs[layer] for layer, point in found.items()}
        dense = {
            layer: ratios[layer]
            for layer, point in found.items()
            if is_dense(ratios[layer], point.error, self.least, price * len(point.steps))
        }
        points = {layer: point for layer, point in found.items() if layer not in dense}
        total = sum(ratios[layer] for layer in points) + sum(1 + self.least for _ in dense)
        return Priced(
            price=price,
            points=points,
            dense=dense,
            sign=sign,
            ffn_bytes_ratio=total / len(ratios),
            error=sum(point.error for point in points.values()),
        )


def is_dense(ratio: float, error: float, least: float, price: float) -> bool:
    """Whether a layer is better computed whole.

    Args:
        ratio: FFN bytes ratio with its predictor.
        error: what it misses with that.
        least: bytes of a dense layer's predictor relative to the FFN, infinite where none may be.
        price: of computing all of the layer's neurons, in the unit of `error`.
    """
    return least < math.inf and (ratio >= 1 or error > price * (1 + least - ratio))


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


def _crossing(layers: Layers, sign: int, holds: Callable[[Priced], bool]) -> tuple[Priced, Priced]:
    """Return the operating points on both sides of the price at which `holds` turns false."""
    option = partial(layers.at, sign=sign)
    last, first = price_bracket(lambda price: holds(option(price)))
    return option(last), option(first)


def fewest_bytes(layers: Layers, error: float) -> Priced:
    """Return what keeps an error in the fewest bytes, or else comes nearest to it."""
    found = [_crossing(layers, s, lambda priced: priced.error <= error)[0] for s in SIGNS]
    return min(found, key=lambda priced: (max(priced.error, error), priced.ffn_bytes_ratio))


def least_error(layers: Layers, ffn_bytes: float) -> Priced:
    """Return what misses least within a mean FFN bytes ratio, or else comes nearest to it."""
    found = [
        _crossing(layers, s, lambda priced: priced.ffn_bytes_ratio > ffn_bytes)[1] for s in SIGNS
    ]
    return min(found, key=lambda priced: (max(priced.ffn_bytes_ratio, ffn_bytes), priced.error))
