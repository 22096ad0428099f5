"""The thresholds that are measured, in units of a neuron's mean positive logit.

They are the numbers at which a float32's sign, exponent or first two digits change: four in each
octave, on both sides of zero. So the leading bits of a logit say which of them it reaches, several
times as fast as comparisons.
"""

from __future__ import annotations

import torch

_BELOW, _ABOVE = (-4, 2), (-7, 3)
"""Octaves from and to which thresholds below and above zero reach: next to all neurons are computed
at one end, next to none at the other."""

_QUARTERS = 4
_LOWER_BITS = 21
"""Bits of a float32 behind those that tell quarters of an octave."""

_BIAS = 127
"""Of a float32's exponent."""


def factors() -> torch.Tensor:
    """Return the thresholds, (steps,) float32, rising from below zero to above it."""
    quarters = 1 + torch.arange(_QUARTERS) / _QUARTERS
    below, above = (
        torch.outer(torch.exp2(torch.arange(*ends)), quarters).flatten()
        for ends in (_BELOW, _ABOVE)
    )
    return torch.cat([-below.flip(0), above])


def reached(values: torch.Tensor) -> torch.Tensor:
    """Return how many of the thresholds are not above each value.

    Args:
        values: float32, any shape.

    Returns:
        int32 of that shape.
    """
    bits = values.view(torch.int32)
    negative = bits >> 31
    # Sign and magnitude become a whole number that rises by one from quarter to quarter.
    steps = (
        (negative & 0x7FFFFFFF).bitwise_xor_(bits).sub_(negative).bitwise_right_shift_(_LOWER_BITS)
    )
    start, end = (_QUARTERS * (_BIAS + octave) for octave in (_ABOVE[0], _BELOW[1]))
    below = (steps + end).clamp_(0, _QUARTERS * (_BELOW[1] - _BELOW[0]))
    above = steps.sub_(start - 1).clamp_(0, _QUARTERS * (_ABOVE[1] - _ABOVE[0]))
    return below.add_(above)
