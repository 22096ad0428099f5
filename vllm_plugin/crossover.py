"""When the sparse operators are faster than dense products: measured on this machine, once a shape.

A sparse FFN reads the whole gate and the other two matrices' active rows; its time grows with the
share of active neurons, and at some share reaches that of the dense products. That share hangs on
processor, type, sizes and tokens; so it is measured when first needed, on the model's weights.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import ref

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparse_operators.settings import MAX_TOKENS
from vllm_plugin import kernels

_SHARES = (0.02, 0.3)
"""Shares of active neurons that the operators are timed at; between and beyond, a straight line."""

_REPEATS = 8
_LAYERS = 4
"""Layers whose weights are used by turns, so that a cache does not hold them."""

SUPPOSED_SHARE = 0.12
"""Of active neurons, where they cannot be counted without waiting for the device (CUDA); as many
as ProSparse-7B has without FATReLU (arXiv 2402.13516)."""


@dataclass(frozen=True)
class Weights:
    """An FFN's, neurons in rows.

    Attributes:
        gate_up: (2 * d_ff, d_model), the gate's rows first.
        down: (d_model, d_ff).
        rows: (d_ff, d_model), `down` transposed and contiguous.
    """

    gate_up: Tensor
    down: Tensor
    rows: Tensor

    @property
    def gate(self) -> Tensor:
        """The gate (d_ff, d_model)."""
        return self.gate_up[: len(self.rows)]

    @property
    def up(self) -> Tensor:
        """The up projection (d_ff, d_model)."""
        return self.gate_up[len(self.rows) :]

    @property
    def kind(self) -> tuple[object, ...]:
        """What two FFNs of the same speed have in common."""
        return *self.rows.shape, self.rows.dtype, self.rows.device


@dataclass
class Crossover:
    """What was measured in this process.

    Attributes:
        taken: how often an FFN went either way, `sparse` or `dense`.
    """

    taken: Counter[str] = field(default_factory=Counter)
    _seen: dict[tuple[object, ...], list[tuple[ref[Tensor], ...]]] = field(default_factory=dict)
    _limits: dict[tuple[object, ...], float] = field(default_factory=dict)

    def limit(self, weights: Weights, tokens: int) -> float:
        """Return the share of active neurons up to which the operators are faster.

        Args:
            weights: the FFN's.
            tokens: rows of its input.
        """
        kind = weights.kind
        seen = [each for each in self._seen.get(kind, ()) if each[-1]() is not None]
        self._seen[kind] = seen
        if len(seen) < _LAYERS and all(each[-1]() is not weights.rows for each in seen):
            # Weakly: a model that is gone must not stay in memory for this.
            seen.append((ref(weights.gate_up), ref(weights.down), ref(weights.rows)))
        if not 0 < tokens <= MAX_TOKENS:
            return 0.0
        case = (*kind, tokens)
        if case not in self._limits:
            self._limits[case] = measured_limit(_alive(seen) or [weights], tokens)
        return self._limits[case]


def _alive(seen: Sequence[tuple[ref[Tensor], ...]]) -> list[Weights]:
    """Return the weights that are still somebody's."""
    found = [[each() for each in layer] for layer in seen]
    return [Weights(a, b, c) for a, b, c in found if not (a is None or b is None or c is None)]


def measured_limit(layers: Sequence[Weights], tokens: int) -> float:
    """Measure the share at which gate, S2 and S3 take as long as the three dense products.

    Args:
        layers: FFNs of equal sizes, used by turns.
        tokens: 1 to 8.

    Returns:
        0 to 1; 0 where the operators are never faster.
    """
    like = layers[0].rows
    d_ff, d_model = like.shape
    x, x1 = like.new_empty(tokens, d_model).normal_(), like.new_empty(tokens, d_ff).normal_()

    def dense(layer: Weights) -> object:
        return linear(x, layer.gate_up), linear(x1, layer.down)

    def sparse_at(share: float) -> Callable[[Weights], object]:
        noise = torch.rand(tokens, d_ff, device=like.device)
        scores = torch.where(noise < share, noise + 0.5, -1.0).to(like.dtype)
        return lambda layer: (
            linear(x, layer.gate),
            kernels.up_down(scores, x, layer.up, layer.rows, threshold=0.0),
        )

    low, high = (_seconds(sparse_at(share), layers) for share in _SHARES)
    slope = max(high - low, 1e-9) / (_SHARES[1] - _SHARES[0])
    at = _SHARES[0] + (_seconds(dense, layers) - low) / slope
    return min(max(at, 0.0), 1.0)


def _seconds(run: Callable[[Weights], object], layers: Sequence[Weights]) -> float:
    """Return the shortest time of a run: what else the machine does only ever adds to it."""
    times = []
    for turn in range(_REPEATS + 1):
        _wait(layers[0].rows)
        start = time.perf_counter()
        run(layers[turn % len(layers)])
        _wait(layers[0].rows)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
