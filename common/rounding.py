"""Numbers as ggml rounds them: weights to Q4_0, the vectors that multiply them to F16 or Q8_0.

Q4_0 and Q8_0 are blocks of 32 along the last dimension with a float16 scale (PowerInfer@d3ebd7c
ggml-quants.c:quantize_row_q4_0_reference, quantize_row_q8_0; its second engine's
smallthinker/ggml/src/ggml-quants.c does the same).
"""

from __future__ import annotations

from typing import Any

import torch

BLOCK = 32
_BLOCK_BYTES = 18
_LARGEST_STEP = 127
"""Of Q8_0."""


def to_f16(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to the nearest float16 value, kept as float32."""
    return x.half().float()


def to_q8_0(x: torch.Tensor) -> torch.Tensor:
    """Round (..., n) float32 to 8 bits, n a multiple of 32; ties go to even."""
    steps, largest = q8_steps(x)
    return (steps * to_f16(largest / _LARGEST_STEP)).reshape(x.shape)


def q8_steps(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return blocks of 32, (blocks, 32), as whole numbers up to 127, and each one's largest size.

    Args:
        x: (..., n) float32, n a multiple of 32.
    """
    blocks = x.reshape(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    inverse = torch.where(largest > 0, _LARGEST_STEP / largest, 0.0)
    return (blocks * inverse).round_(), largest


def to_q4_0(x: torch.Tensor) -> torch.Tensor:
    """Round to 4 bits: what is largest in a block becomes -8 of its scale.

    Args:
        x: (..., n) float32, n a multiple of 32, at most 5e5 in magnitude.

    Returns:
        The rounded numbers, of the same shape.
    """
    blocks = x.reshape(-1, BLOCK)
    scale = q4_scales(blocks)
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    steps = (blocks * inverse).add_(8.5).trunc_().clamp_(0, 15).sub_(8)
    return steps.mul_(to_f16(scale)).reshape(x.shape)


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


def q4_scales(blocks: torch.Tensor) -> torch.Tensor:
    """Return the scales (n, 1) float32 of blocks (n, 32) that ggml takes, before they are F16."""
    return blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8


def pack_q4_0(scales: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Return rows as a file stores them.

    Args:
        scales: (rows, blocks) float32, exact float16 values.
        steps: (rows, 32 · blocks), whole numbers from -8 to 7 of any type.

    Returns:
        (rows, 18 · blocks) uint8.
    """
    rows, blocks = scales.shape
    nibbles = (steps.to(torch.int16) + 8).to(torch.uint8).reshape(rows, blocks, 2, BLOCK // 2)
    numbers = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
    heads = scales.half().contiguous().view(torch.uint8).reshape(rows, blocks, 2)
    return torch.cat([heads, numbers], dim=2).reshape(rows, blocks * _BLOCK_BYTES)


def unpack_q4_0(stored: torch.Tensor) -> torch.Tensor:
    """Return the numbers (rows, 32 · blocks) float32 of rows as `pack_q4_0` makes them."""
    scales, numbers = _parts(stored)
    steps = torch.cat([numbers & 15, numbers >> 4], dim=2).float() - 8
    return (steps * scales.float()).reshape(len(stored), -1)


def scale_q4_0(stored: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Multiply rows (rows, 18 · blocks) uint8 by positive factors, (rows,) float32.

    Returns:
        Rows whose scales are rounded to float16, their steps as they were.
    """
    scales, numbers = _parts(stored)
    scaled = (scales.float() * factors[:, None, None]).half().contiguous().view(torch.uint8)
    return torch.cat([scaled, numbers], dim=2).reshape(stored.shape)


def _parts(stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales (rows, blocks, 1) float16 and bytes of two steps each, (rows, blocks, 16)."""
    blocks = stored.reshape(len(stored), -1, _BLOCK_BYTES)
    return blocks[:, :, :2].contiguous().view(torch.float16), blocks[:, :, 2:]
