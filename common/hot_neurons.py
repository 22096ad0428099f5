"""How few neurons make how many of the activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

SHARES = tuple(step / 100 for step in range(101))
"""Shares of neurons that curves are taken at."""


def hot_neuron_curve(counts: torch.Tensor) -> tuple[float, ...] | None:
    """Return the share of activations that the hottest neurons capture, at every one of `SHARES`.

    Between whole numbers of neurons it is linear.

    Args:
        counts: int64 of any shape, tokens on which each neuron was active.

    Returns:
        101 ascending shares from 0 to 1; None if no neuron was ever active.
    """
    hottest = counts.flatten().sort(descending=True).values.double().numpy()
    if not hottest.sum():
        return None
    captured = np.concatenate([[0.0], np.cumsum(hottest) / hottest.sum()])
    return tuple(np.interp(SHARES, np.linspace(0, 1, len(captured)), captured).tolist())
