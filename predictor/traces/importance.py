"""The importance of an active neuron in a few bits.

|act(g)·u| times the norm of the neuron's down column is the norm of what the neuron adds to the
residual stream: its importance. Training weighs positives by it, for which the order of magnitude
is enough. So a row stores the mean importance of its active neurons as float32 and, for each of
them, the logarithm of its share of that mean in equal steps:

====  ==========  =======================================================================
bits  octaves     covers
====  ==========  =======================================================================
2     2 a step    below 1/4 of the row's mean, up to the mean, up to 4 times, beyond
4     1 a step    2^-11 to 2^5 of the mean
8     1/8 a step  2^-20 to 2^12 of the mean; fine enough to rank neurons by
====  ==========  =======================================================================
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

_STEP_AND_LOW = {2: (2.0, -4.0), 4: (1.0, -11.0), 8: (0.125, -20.0)}
BITS = (0, *_STEP_AND_LOW)
"""Bits an active neuron may take; 0 stores no importance."""

RANKING_BITS = 8
"""Fewer bits cannot tell which of two neurons matters more."""


def encode_importance(relative: torch.Tensor, bits: int) -> torch.Tensor:
    """Encode importance relative to the row's mean (any shape, float, >= 0) as uint8 codes."""
    step, low = _STEP_AND_LOW[bits]
    code = (torch.log2(relative.clamp_min(1e-30)) - low) / step
    return code.clamp_(0, 2**bits - 1).to(torch.uint8)


def decode_importance(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return float32 importance relative to the row's mean: the middle of each code's step."""
    step, low = _STEP_AND_LOW[bits]
    return torch.exp2((codes.float() + 0.5) * step + low)


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Pack codes into bytes, lowest bits first; the last byte is filled up with zeros."""
    each = 8 // bits
    padded = np.zeros(-(-len(codes) // each) * each, np.uint8)
    padded[: len(codes)] = codes
    packed = np.zeros(len(padded) // each, np.uint8)
    for slot in range(each):
        packed |= padded[slot::each] << np.uint8(slot * bits)
    return packed


def codes_at(packed: torch.Tensor, positions: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the uint8 codes at int64 positions of a packed uint8 vector."""
    each = 8 // bits
    shift = (positions % each * bits).to(torch.uint8)
    codes: torch.Tensor = (packed[positions // each] >> shift) & (2**bits - 1)
    return codes
