"""Numbers as the second engine multiplies them: weights in Q4_0, what it multiplies in Q8_0.

Both are blocks of 32 along the last dimension with a float16 scale (PowerInfer@d3ebd7c
smallthinker/ggml/src/ggml-quants.c:quantize_row_q4_0_ref, smallthinker/powerinfer/powerinfer-cpu/
src/vec_dot.hpp:quantize_row_q8_0).
"""

from __future__ import annotations

from typing import Any

import torch

BLOCK = 32


def to_q4_0(x: torch.Tensor) -> torch.Tensor:
    """Round to 4 bits: what is largest in a block becomes -8 of its scale.

    Args:
        x: (..., n) float32, n a multiple of 32, at most 5e5 in magnitude.

    Returns:
        The rounded numbers, of the same shape.
    """
    blocks = x.reshape(-1, BLOCK)
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = extreme / -8
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    steps = (blocks * inverse).add_(8.5).trunc_().clamp_(0, 15).sub_(8)
    return steps.mul_(scale.half().float()).reshape(x.shape)


def to_q8_0(x: torch.Tensor) -> torch.Tensor:
    """Round (..., n) float32 to 8 bits, n a multiple of 32; ties go to even."""
    blocks = x.reshape(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0.0)
    return ((blocks * inverse).round_() * (largest / 127).half().float()).reshape(x.shape)


class _Through(torch.autograd.Function):
    """Rounds, and hands gradients on as if it had not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return to_q4_0(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def through_q4_0(x: torch.Tensor) -> torch.Tensor:
    """Return `to_q4_0` of (..., n), whose gradient is that of the numbers themselves."""
    rounded: torch.Tensor = _Through.apply(x)  # type: ignore[no-untyped-call]
    return rounded
