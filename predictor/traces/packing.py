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
from packaging.version import Version

_STEP_AND_LOW = {2: (2.0, -4.0), 4: (1.0, -11.0), 8: (0.125, -20.0)}
BITS = (0, *_STEP_AND_LOW)
"""Bits an active neuron may take; 0 stores no importance."""

_GATHERING = 0x0102040810204080
_KNOWN_SIZES = Version(torch.__version__) >= Version("2.7")
"""Whether torch finds a known number of true entries on a GPU; it can since
https://github.com/pytorch/pytorch/pull/141838."""

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
    if -d_ff % 8:
        active = torch.nn.functional.pad(active, (0, -d_ff % 8))
    # Eight neurons, a byte each, are one integer: a product brings their bits together in its
    # highest byte.
    packed = (active.contiguous().view(torch.int64) * _GATHERING).view(torch.uint8)
    return packed.view(rows, -1, 8)[:, :, 7].contiguous()


def unpack_active(packed: torch.Tensor, d_ff: int) -> torch.Tensor:
    """Unpack (rows, ceil(d_ff / 8)) uint8 into (rows, d_ff) bool, on the same device."""
    if packed.device.type != "cpu":
        return unpack_on_device(packed, d_ff)
    bits = np.unpackbits(packed.numpy(), axis=1, count=d_ff, bitorder="little")
    return torch.from_numpy(bits.view(bool))


def unpack_on_device(packed: torch.Tensor, d_ff: int) -> torch.Tensor:
    """Do the same with torch alone."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, :, None] >> places).bitwise_and_(1)
    return bits.view(torch.bool).flatten(1)[:, :d_ff]


def active_places(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row and neuron, int64 each, of every bit set on the CPU, in order."""
    width = 8 * packed.shape[1]
    places, row = flat_places(packed, width)
    return row, places - row * width


def flat_places(packed: torch.Tensor, d_ff: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places in (rows, d_ff), flattened, of bits set on the CPU, and the row of each.

    Sparse rows have few non-zero bytes, so this is several times faster than looking for true
    entries among all neurons.

    Args:
        packed: (rows, ceil(d_ff / 8)) uint8.
        d_ff: neurons of a row.

    Returns:
        Both int64, in order.
    """
    rows, width = packed.shape
    flat: npt.NDArray[np.uint8] = packed.numpy().ravel()
    where = np.flatnonzero(flat != 0)
    bits = np.flatnonzero(np.unpackbits(flat[where], bitorder="little").view(bool))
    places = where[bits >> 3]
    places <<= 3
    places += bits & 7
    bounds = np.searchsorted(places, np.arange(rows + 1) * (8 * width))
    row = np.repeat(np.arange(rows), np.diff(bounds))
    if filling := 8 * width - d_ff:
        places -= row * filling
    return torch.from_numpy(places), torch.from_numpy(row)


def true_places(active: torch.Tensor, total: int) -> torch.Tensor:
    """Return the places of the true entries of a bool tensor, flattened, (total,) int64 in order.

    Args:
        active: of any shape, on any device.
        total: how many there are; who knows it need not wait for the device to count them.
    """
    flat = active.reshape(-1)
    if _KNOWN_SIZES or flat.device.type == "cpu":
        return torch.nonzero_static(flat, size=total)[:, 0]
    return flat.nonzero()[:, 0]


def count_active(packed: torch.Tensor) -> torch.Tensor:
    """Return (rows,) int64, the number of set bits of every row, on the same device."""
    if packed.device.type == "cpu" and hasattr(np, "bitwise_count"):
        return torch.from_numpy(np.bitwise_count(packed.numpy()).sum(1, dtype=np.int64))
    bits = torch.tensor([value.bit_count() for value in range(256)]).to(packed.device)
    parts = [bits[part.long()].sum(1) for part in torch.split(packed, 4096)]
    return torch.cat([bits[:0], *parts])


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
    if len(codes) % each:
        codes = np.pad(codes, (0, -len(codes) % each))
    # The codes of a byte, one a byte, are one integer: its bytes move together into the lowest.
    together = codes.view(f"<u{each}")
    packed = together.copy()
    for slot in range(1, each):
        packed |= together >> slot * (8 - bits)
    return packed.astype(np.uint8)


def pack_codes_on_device(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Do the same with torch alone, leaving the result on the device."""
    each = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % each)).view(-1, each)
    packed = padded[:, 0].clone()
    for slot in range(1, each):
        packed |= padded[:, slot] << slot * bits
    return packed


def shift_codes(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Move packed codes up by some bits, fewer than 8: one byte more, zeros come in below."""
    shifted = np.zeros(len(packed) + 1, np.uint8)
    np.left_shift(packed, np.uint8(bits), out=shifted[:-1])
    shifted[1:] |= packed >> np.uint8(8 - bits)
    return shifted


def codes_at(packed: torch.Tensor, positions: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the uint8 codes at int64 positions of a packed uint8 vector."""
    each = 8 // bits
    # A power of two: masks and shifts are several times as fast as divisions.
    shift = (positions & (each - 1)).to(torch.uint8).mul_(bits)
    bytes_ = packed.index_select(0, positions >> (each.bit_length() - 1))
    return bytes_.bitwise_right_shift_(shift).bitwise_and_(2**bits - 1)
