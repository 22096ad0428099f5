"""How rows are packed: active neurons as bits, and the importance of each in a few bits.

Bits stand least significant first.

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


def pack_active(active: torch.Tensor) -> torch.Tensor:
    """Pack (rows, d_ff) bool, on any device, into (rows, ceil(d_ff / 8)) uint8 on the CPU."""
    if active.device.type == "cpu":
        return torch.from_numpy(np.packbits(active.numpy(), axis=1, bitorder="little"))
    # Packed where it is: an eighth of the bytes crosses the bus.
    return pack_on_device(active).cpu()


def pack_on_device(active: torch.Tensor) -> torch.Tensor:
    """Do the same with torch alone, leaving the result on the device."""
    rows, d_ff = active.shape
    padded = torch.nn.functional.pad(active.to(torch.uint8), (0, -d_ff % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=active.device)
    return (padded.view(rows, -1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_active(packed: torch.Tensor, d_ff: int) -> torch.Tensor:
    """Unpack (rows, ceil(d_ff / 8)) uint8 on the CPU into (rows, d_ff) bool."""
    bits = np.unpackbits(packed.numpy(), axis=1, count=d_ff, bitorder="little")
    return torch.from_numpy(bits.view(bool))


def active_places(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row and neuron, int64 each, of every set bit in order.

    Sparse rows have few non-zero bytes, so this is several times faster than looking for true
    entries among all neurons.
    """
    rows, width = packed.shape
    flat: npt.NDArray[np.uint8] = packed.numpy().ravel()
    where = np.flatnonzero(flat != 0)
    bits = np.flatnonzero(np.unpackbits(flat[where], bitorder="little").view(bool))
    places = where[bits >> 3] * 8 + (bits & 7)
    bounds = np.searchsorted(places, np.arange(rows + 1) * (8 * width))
    row = np.repeat(np.arange(rows), np.diff(bounds))
    return torch.from_numpy(row), torch.from_numpy(places - row * (8 * width))


def count_active(packed: torch.Tensor) -> torch.Tensor:
    """Return (rows,) int64, the number of set bits of every row."""
    bits = torch.tensor([value.bit_count() for value in range(256)])
    parts = [bits[part.long()].sum(1) for part in torch.split(packed, 4096)]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])


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
