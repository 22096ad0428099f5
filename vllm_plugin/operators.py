"""The FFN and the count of active neurons as operators: `psp::gated_ffn`, `psp::count_active`.

Whether an FFN runs sparsely depends on the number of tokens and on their activations. In compiled
code a branch on either is decided once, for good; inside an operator it is decided at every call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparse_operators.reference import computes
from vllm_plugin import kernels
from vllm_plugin.crossover import SUPPOSED_SHARE, Crossover, Weights
from vllm_plugin.real_tokens import real_tokens

CROSSOVER = Crossover()
"""This process's."""

MOST_COUNTED = 32
"""Tokens of a step whose neurons are counted: of a longer prompt an even choice, for counting all
would take a tenth of a small model's time."""

_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@torch.library.custom_op(
    "psp::gated_ffn",
    mutates_args=("counts",),
    schema="(Tensor x, Tensor gate_up, Tensor down, Tensor rows, Tensor(a!)? counts, "
    "float threshold, bool double_relu) -> Tensor",
)
def gated_ffn(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    rows: Tensor,
    counts: Tensor | None,
    threshold: float,
    double_relu: bool,
) -> Tensor:
    """Return `down(act(gate(x)) * up(x))`, sparsely where that is faster.

    Args:
        x: (tokens, d_model).
        gate_up: (2 * d_ff, d_model), the gate's rows first.
        down: (d_model, d_ff).
        rows: `down` transposed, (d_ff, d_model), contiguous.
        counts: as in `count_active`, or None.
        threshold: 0 for ReLU, T for FATReLU.
        double_relu: `up`, too, passes a ReLU.

    Returns:
        (tokens, d_model).
    """
    weights = Weights(gate_up, down, rows)
    limit = CROSSOVER.limit(weights, len(x))
    if limit:
        scores = linear(x, weights.gate)
        share = SUPPOSED_SHARE if x.is_cuda else computes(scores, threshold).float().mean().item()
        if share <= limit:
            CROSSOVER.taken["sparse"] += 1
            return _sparse(x, scores, weights, counts, threshold, double_relu)
        up = linear(x, weights.up)
    else:
        scores, up = linear(x, gate_up).chunk(2, -1)
    CROSSOVER.taken["dense"] += 1
    if counts is not None:
        _count(scores, up if double_relu else None, counts, threshold)
    return linear(activate(scores, up, threshold, double_relu), down)


@gated_ffn.register_fake
def _gated_ffn_fake(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    rows: Tensor,
    counts: Tensor | None,
    threshold: float,
    double_relu: bool,
) -> Tensor:
    return torch.empty_like(x)


def _sparse(
    x: Tensor,
    scores: Tensor,
    weights: Weights,
    counts: Tensor | None,
    threshold: float,
    double_relu: bool,
) -> Tensor:
    if not double_relu:
        if counts is not None:
            _count(scores, None, counts, threshold)
        return kernels.up_down(scores, x, weights.up, weights.rows, threshold=threshold)
    # The gate's half is not negative, so the ReLU on `up` may come after their product.
    x1 = kernels.up(scores, x, weights.up, threshold=threshold).relu()
    if counts is not None:
        _count(x1, None, counts, 0.0)
    return kernels.down(x1, weights.rows)


def activate(gate: Tensor, up: Tensor, threshold: float, double_relu: bool) -> Tensor:
    """Return `act(gate) * up`.

    Args:
        gate: scores (tokens, d_ff).
        up: (tokens, d_ff).
        threshold: 0 for ReLU, T for FATReLU, as the scores' type holds it.
        double_relu: `up`, too, passes a ReLU.
    """
    gate = torch.where(gate >= threshold, gate, 0) if threshold else gate.relu()
    return gate * (up.relu() if double_relu else up)


@torch.library.custom_op(
    "psp::count_active",
    mutates_args=("counts",),
    schema="(Tensor gate_up, Tensor(a!) counts, float threshold, bool double_relu) -> ()",
)
def count_active(gate_up: Tensor, counts: Tensor, threshold: float, double_relu: bool) -> None:
    """Count for each neuron the tokens that activate it, padding and trial runs left out.

    Args:
        gate_up: the gate's scores, then the up projection, (tokens, 2 * d_ff).
        counts: (d_ff + 1,) int64, added to; the last one counts the tokens that were looked at,
            at most `MOST_COUNTED`.
        threshold: 0 for ReLU, T for FATReLU.
        double_relu: active is what is above 0 in both halves.
    """
    gate, up = gate_up.chunk(2, -1)
    _count(gate, up if double_relu else None, counts, threshold)


@count_active.register_fake
def _count_active_fake(
    gate_up: Tensor, counts: Tensor, threshold: float, double_relu: bool
) -> None:
    return None


def _count(gate: Tensor, up: Tensor | None, counts: Tensor, threshold: float) -> None:
    """Add to counts what of a gate is active, and above 0 in `up` too where there is one."""
    real = real_tokens(len(gate))
    if real is None:
        return
    every = slice(None, None, -(-len(gate) // MOST_COUNTED))
    gate, real = gate[every], real[every]
    active = _above(gate, threshold)
    if up is not None:
        active &= _above(up[every], 0.0)
    if real.is_cuda or not real.all():  # a GPU would have to be waited for
        active &= real[:, None]
    # So few rows do not overflow a byte, and bytes are added many times faster than bools.
    counts[:-1] += active.view(torch.uint8).sum(0, dtype=torch.uint8)
    counts[-1] += real.sum()


def _above(values: Tensor, threshold: float) -> Tensor:
    """Tell which values are at least a threshold, above 0 if that is 0.

    Positive floats are ordered as their bits are, and whole numbers are compared twice as fast.
    """
    kind = _BITS[values.dtype]
    bits = torch.tensor(threshold, dtype=values.dtype).view(kind).item()
    whole = values.view(kind)
    return whole >= bits if bits else whole > 0
