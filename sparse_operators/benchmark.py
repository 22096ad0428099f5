"""S2, S3 and the FFN made of them against dense products, and against what memory allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from common.errors import EngineError
from sparse_operators.bandwidth import bound_seconds, cache_bytes, stream
from sparse_operators.hardware import hardware, versions
from sparse_operators.operators import sparse_down, sparse_up, sparse_up_down
from sparse_operators.patterns import RUNS, draw_rows, intermediate_of, random_masks, scores_of
from sparse_operators.timing import (
    Operation,
    Samples,
    quartiles,
    time_calls,
    time_graphs,
    time_launches,
)

_MAX_SLOTS = 64
_SLOTS_OF_A_TURN = 11
"""What the seven operations of a turn read; no multiple of it, so that they change slots."""


@dataclass(frozen=True, kw_only=True)
class OperatorBenchConfig:
    """What to measure.

    Attributes:
        d_model: hidden size.
        d_ff: neurons.
        sparsities: shares of inactive neurons, a measurement each.
        pattern: how active neurons lie, a name in `patterns.RUNS`.
        traced: instead of the two above: label to (tokens, d_ff) bool masks of real tokens.
        device: `cpu` or a CUDA device.
        dtype: of weights and inputs.
        repeats: timed turns.
        seed: of weights, inputs and masks.
    """

    d_model: int
    d_ff: int
    sparsities: tuple[float, ...] = (0.0, 0.5, 0.67, 0.88, 0.95)
    pattern: str = "random"
    traced: Mapping[str, Tensor] = field(default_factory=dict)
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    repeats: int = 25
    seed: int = 0

    @property
    def matrix_bytes(self) -> int:
        """Size of one of the FFN's three matrices."""
        return self.d_model * self.d_ff * self.dtype.itemsize

    @property
    def least_share(self) -> float:
        """The least share of a matrix that an operator will read."""
        shares = [float(masks.float().mean()) for masks in self.traced.values()]
        return min(shares or (1 - sparsity for sparsity in self.sparsities))


@torch.inference_mode()
def bench_operators(config: OperatorBenchConfig) -> dict[str, Any]:
    """Measure every sparsity, dense and sparse by turns, and judge by medians.

    Returns:
        The document that `psp bench-operators --json` prints; times in seconds.

    Raises:
        EngineError: the device's memory does not hold the weights.
    """
    device = torch.device(config.device)
    generator = torch.Generator().manual_seed(config.seed)
    cache = cache_bytes(device)
    slots = slot_count(config, cache)
    weights = _weights(config, slots, generator)
    cases = {
        label: draw_rows(masks, slots, generator) for label, masks in config.traced.items()
    } or {
        f"{100 * sparsity:g} %": random_masks(
            slots, config.d_ff, sparsity, run=RUNS[config.pattern], generator=generator
        )
        for sparsity in config.sparsities
    }
    rows = []
    for label, masks in cases.items():
        inputs = _Inputs.draw(config, masks, generator)
        rows.append({"label": label, **_measure(config, inputs, weights)})
    return {
        "shape": {"d_model": config.d_model, "d_ff": config.d_ff},
        "pattern": "traced" if config.traced else config.pattern,
        "dtype": str(config.dtype).removeprefix("torch."),
        "device": config.device,
        "hardware": hardware(device),
        "versions": versions(),
        "clock": "events in CUDA graphs" if device.type == "cuda" else "wall clock",
        "repeats": config.repeats,
        "weight_copies": slots,
        "cache_bytes": cache,
        "exceeds_cache": slots >= _slots_needed(config, cache),
        "sparsities": rows,
    }


def slot_count(config: OperatorBenchConfig, cache: int) -> int:
    """Return how many matrices to read by turns: enough that no cache of `cache` bytes helps."""
    slots = max(4, min(_MAX_SLOTS, _slots_needed(config, cache)))
    return slots + (slots % _SLOTS_OF_A_TURN == 0)


def _slots_needed(config: OperatorBenchConfig, cache: int) -> int:
    # A graph calls the sparse operator alone; on the CPU dense calls stream in between, and two
    # thirds of what a turn reads is theirs.
    share = config.least_share if config.device != "cpu" else 2 / 3
    return math.ceil(2 * cache / (config.matrix_bytes * max(share, 1 / config.d_ff)))


def _weights(config: OperatorBenchConfig, slots: int, generator: torch.Generator) -> Tensor:
    """Return (slots, d_ff, d_model) normal numbers, the same ones at every place."""
    shape = (config.d_ff, config.d_model)
    try:
        one = torch.randn(shape, generator=generator).to(config.device, config.dtype)
        weights = torch.empty(slots, *shape, dtype=config.dtype, device=config.device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one, too
        gigabytes = slots * config.matrix_bytes / 1e9
        raise EngineError(
            f"{config.device}: no memory for {slots} matrices of {shape}, {gigabytes:.1f} GB in "
            "all",
            "choose a smaller --shape",
        ) from error
    return weights.copy_(one)


@dataclass(frozen=True)
class _Inputs:
    """What the operators are given: one token a slot."""

    x: Tensor
    scores: Tensor
    intermediate: Tensor
    active: float

    @classmethod
    def draw(
        cls, config: OperatorBenchConfig, masks: Tensor, generator: torch.Generator
    ) -> _Inputs:
        dtype, tokens = config.dtype, masks[:, None]
        x = torch.randn(len(masks), 1, config.d_model, generator=generator).to(dtype)
        return cls(
            x=x.to(config.device),
            scores=scores_of(tokens, dtype, generator).to(config.device),
            intermediate=intermediate_of(tokens, dtype, generator).to(config.device),
            active=float(masks.sum(1).float().mean()),
        )


def operations(inputs: _Inputs, weights: Tensor) -> dict[str, Operation]:
    """Return what a turn times; the FFN's gate is dense in both kinds."""
    x, scores, intermediate, slots = inputs.x, inputs.scores, inputs.intermediate, len(weights)

    def dense_up(slot: int, matrix: int) -> Tensor:
        return scores[slot].relu() * linear(x[slot], weights[matrix % slots])

    def dense_down(slot: int, matrix: int) -> Tensor:
        # The same bytes in the layout of down_proj.weight, (d_model, d_ff).
        down = weights[matrix % slots].view(x.shape[-1], -1)
        return linear(intermediate[slot], down)

    def dense_ffn(slot: int) -> Tensor:
        linear(x[slot], weights[slot])
        dense_up(slot, slot + 1)
        return dense_down(slot, slot + 2)

    def sparse_ffn(slot: int) -> Tensor:
        linear(x[slot], weights[slot])
        w1, w2t = weights[(slot + 1) % slots], weights[(slot + 2) % slots]
        return sparse_up_down(scores[slot], x[slot], w1, w2t, check=False)

    return {
        "read": Operation(run=lambda slot: stream(weights[slot])),
        "s2_dense": Operation(run=lambda slot: dense_up(slot, slot)),
        "s2": Operation(
            run=lambda slot: sparse_up(scores[slot], x[slot], weights[slot], check=False)
        ),
        "s3_dense": Operation(run=lambda slot: dense_down(slot, slot)),
        "s3": Operation(
            run=lambda slot: sparse_down(intermediate[slot], weights[slot], check=False)
        ),
        "ffn_dense": Operation(run=dense_ffn, slots=3),
        "ffn": Operation(run=sparse_ffn, slots=3),
    }


def _measure(config: OperatorBenchConfig, inputs: _Inputs, weights: Tensor) -> dict[str, Any]:
    timed = operations(inputs, weights)
    eager: Samples | None = None
    if config.device == "cpu":
        samples = time_calls(timed, len(weights), config.repeats)
    else:
        eager = time_launches(timed, len(weights), config.repeats)
        samples = time_graphs(timed, len(weights), config.repeats)
    row = {
        "sparsity": 1 - inputs.active / config.d_ff,
        **judge(samples, config, inputs.active),
        **_errors(inputs, weights[0]),
        "samples": samples,
    }
    if eager is not None:
        row["eager"] = {**judge(eager, config, inputs.active), "samples": eager}
    return row


def judge(samples: Samples, config: OperatorBenchConfig, active: float) -> dict[str, Any]:
    """Return medians, speedups and how far the operators are from the memory's bound.

    The bandwidth is that of whichever read a whole matrix fastest, the plain read or a dense
    product: a bound that something beats is none.

    Args:
        samples: by the names of `operations`.
        config: sizes.
        active: mean number of active neurons.
    """
    spread = {name: quartiles(times) for name, times in samples.items()}
    median = {name: middle for name, (_, middle, _) in spread.items()}
    bandwidth = config.matrix_bytes / min(median[name] for name in ("read", "s2_dense", "s3_dense"))
    bound = bound_seconds(active, config.d_model, config.dtype, bandwidth)
    result: dict[str, Any] = {"bandwidth": bandwidth, "bandwidth_bound_seconds": bound}
    for name in ("s2", "s3", "ffn"):
        result[f"{name}_seconds"] = median[name]
        result[f"{name}_dense_seconds"] = median[f"{name}_dense"]
        result[f"{name}_speedup"] = median[f"{name}_dense"] / median[name]
    for name in ("s2", "s3"):
        result[f"{name}_bandwidth"] = bound * bandwidth / median[name]
        result[f"{name}_bandwidth_bound_ratio"] = median[name] / bound if bound else None
    ratios = [result[f"{name}_bandwidth_bound_ratio"] for name in ("s2", "s3")]
    result["bandwidth_bound_ratio"] = max(ratios) if bound else None
    result["quartiles"] = {name: [low, high] for name, (low, _, high) in spread.items()}
    return result


def _errors(inputs: _Inputs, weight: Tensor) -> dict[str, float]:
    """Return ‖y − y₆₄‖ / ‖y₆₄‖ of both operators on the first slot, y₆₄ in float64."""
    x, scores, intermediate = inputs.x[0], inputs.scores[0], inputs.intermediate[0]
    wide = weight.double()
    exact = {
        "s2": scores.double().relu() * (x.double() @ wide.T),
        "s3": intermediate.double() @ wide,
    }
    found = {"s2": sparse_up(scores, x, weight), "s3": sparse_down(intermediate, weight)}
    return {f"{name}_error": _distance(found[name], exact[name]) for name in exact}


def _distance(found: Tensor, exact: Tensor) -> float:
    norm = float(exact.norm())
    return float((found.double() - exact).norm()) / norm if norm else float(found.double().norm())
