"""Rounding to Q4_0 that makes up for its own errors.

Columns are rounded one after the other, and what each rounding adds to the products is taken back
as far as the columns that follow can (GPTQ, arXiv 2210.17323): those that always come together, as
a predictor's units and its constant, then keep their sum, which rounding each by itself does not.
"""

from __future__ import annotations

import torch

from common.rounding import BLOCK, pack_q4_0, q4_scales, to_f16

_STEPS = (-8, 7)
_SCALES = torch.linspace(0.7, 1.05, 8)
"""Of the scale that ggml would take, tried with either sign."""


def with_feedback(weights: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """Round a matrix so that its products with vectors like those seen change least.

    Args:
        weights: (rows, columns) float32, columns a multiple of 32.
        upper: `feedback_of` the vectors, on the same device.

    Returns:
        (rows, 18 · blocks) uint8 in Q4_0, see `common.rounding.pack_q4_0`.
    """
    left = weights.double()
    scales, steps = [], []
    for first in range(0, left.shape[1], BLOCK):
        last = first + BLOCK
        scale = best_scales(left[:, first:last].float())
        made, errors = _round_block(left[:, first:last], scale, upper[first:last, first:last])
        left[:, last:] -= errors @ upper[first:last, last:]
        scales.append(scale)
        steps.append(made)
    return pack_q4_0(torch.cat(scales, 1), torch.cat(steps, 1))


def by_itself(weights: torch.Tensor) -> torch.Tensor:
    """Round every number of a matrix (rows, columns) float32 to the nearest, likewise."""
    scales = best_scales(weights.reshape(-1, BLOCK))
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    steps = (weights.reshape(-1, BLOCK) * inverse).round_().clamp_(*_STEPS)
    return pack_q4_0(scales.reshape(len(weights), -1), steps.reshape(weights.shape))


def damped(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """Return moments in float64 with a multiple of their mean diagonal added to it."""
    wide = moments.double()
    eye = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    return wide + damping * wide.diagonal().mean() * eye


def feedback_of(moments: torch.Tensor) -> torch.Tensor:
    """Return how errors are handed on, (n, n) float64: the moments' inverse, factored.

    Args:
        moments: (n, n) float64, E[x xᵀ] of vectors, `damped`.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def _round_block(
    weights: torch.Tensor, scale: torch.Tensor, upper: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns of a block.

    Args:
        weights: (rows, 32) float64.
        scale: (rows, 1) float32.
        upper: the factor's part, (32, 32) float64.

    Returns:
        Steps (rows, 32) int8, and the errors (rows, 32) float64 for the columns that follow.
    """
    weights, width = weights.clone(), scale.double()
    inverse = torch.where(width == 0, 0.0, 1 / width)
    steps, errors = torch.empty_like(weights), torch.empty_like(weights)
    for column in range(BLOCK):
        now = weights[:, column]
        steps[:, column] = (now * inverse[:, 0]).round_().clamp_(*_STEPS)
        errors[:, column] = (now - steps[:, column] * width[:, 0]) / upper[column, column]
        weights[:, column:] -= errors[:, column, None] * upper[column, column:]
    return steps.to(torch.int8), errors


def best_scales(blocks: torch.Tensor) -> torch.Tensor:
    """Return the scales (n, 1) float32, exact float16, that round blocks (n, 32) float32 best."""
    usual = q4_scales(blocks)
    best, least = to_f16(usual), torch.full_like(usual, torch.inf)
    for share in torch.cat([_SCALES, -_SCALES]).tolist():
        scale = to_f16(usual * share)
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        error = (blocks * inverse).round_().clamp_(*_STEPS).mul_(scale).sub_(blocks)
        squares = error.square_().sum(1, keepdim=True)
        best = torch.where(squares < least, scale, best)
        least = torch.minimum(squares, least)
    return best
