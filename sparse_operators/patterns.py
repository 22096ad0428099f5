"""Which neurons are active in a benchmark, and inputs that make them so."""

from __future__ import annotations

import torch
from torch import Tensor

RUNS = {"random": 1, "clustered": 64}
"""Neighbours that are active together, by the pattern's name."""


def random_masks(
    count: int, d_ff: int, sparsity: float, *, run: int = 1, generator: torch.Generator
) -> Tensor:
    """Draw which neurons are active.

    Args:
        count: masks to draw.
        d_ff: neurons.
        sparsity: share of inactive neurons, met exactly but for rounding to whole neurons.
        run: neurons that are active or inactive together; one run may be cut short.
        generator: source of chance, on the CPU.

    Returns:
        (count, d_ff) bool on the CPU, true where active.
    """
    active = round((1 - sparsity) * d_ff)
    keys = torch.rand(count, -(-d_ff // run), generator=generator)
    order = keys.repeat_interleave(run, 1)[:, :d_ff].argsort(stable=True)
    return torch.zeros(count, d_ff, dtype=torch.bool).scatter_(1, order[:, :active], True)


def draw_rows(masks: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` rows of (tokens, d_ff) masks, some twice if there are too few."""
    rounds = -(-count // len(masks))
    order = [torch.randperm(len(masks), generator=generator) for _ in range(rounds)]
    return masks[torch.cat(order)[:count]]


def scores_of(masks: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return gate scores, any mask's shape, positive exactly where it is true."""
    size = torch.rand(masks.shape, generator=generator) + 0.1
    return torch.where(masks, size, -size).to(dtype)


def intermediate_of(masks: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return values of either sign, at least 0.1 in size where the mask is true and 0 elsewhere."""
    size = torch.rand(masks.shape, generator=generator) + 0.1
    sign = torch.where(torch.rand(masks.shape, generator=generator) < 0.5, -1.0, 1.0)
    return torch.where(masks, sign * size, 0.0).to(dtype)
