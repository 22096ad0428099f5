"""Active neurons as bits, least significant bit first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


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
