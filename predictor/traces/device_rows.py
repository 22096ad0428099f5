"""A layer's rows for what computes on a device: in its memory, or taken there part by part.

In a device's memory rows are one piece, packed as in the files; what a batch needs of it is
gathered, unpacked and decoded there. The number of active neurons of every row is known here, so
nothing has to be asked of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from common.machine import free_gpu_memory
from common.overlap import made_ahead
from predictor.traces.packing import (
    codes_at,
    count_active,
    pack_codes,
    true_places,
    unpack_on_device,
)
from predictor.traces.rows import LayerRows, ShardedRows, check_counts, damaged_inputs
from predictor.traces.transfer import Beside, Staging, sent

_SHARE = 0.6
"""Of the free memory, that rows may fill: a batch and a start take some gigabytes."""


class ResidentRows(ShardedRows):
    """Rows of one layer in the memory of a device.

    What is read of them is there too; an index, and numbers of active neurons, are on the CPU.

    Attributes:
        per_row: (rows,) int64 on the CPU, how many neurons are active.
    """

    def __init__(self, piece: LayerRows, per_row: torch.Tensor) -> None:
        """Take the rows.

        Args:
            piece: all of them, its inputs known to be finite, its counts on the CPU.
            per_row: (rows,) int64 on the CPU, how many neurons are active.
        """
        super().__init__(piece)
        self._piece, self.per_row = piece, per_row

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._piece.inputs.device

    def inputs_at(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n, d_model) float32 inputs of the rows (n,) int64."""
        return self._gather("inputs", index).float()

    def places_at(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return places in (n, d_ff) and their rows, see `ShardedRows.places_at`."""
        d_ff = len(self.counts)
        active = unpack_on_device(self.active_at(index), d_ff)
        places = true_places(active, int(self.per_row[index].sum()))
        return places, places // d_ff

    def active_counts(self, index: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Return (n,) int64 on the CPU: how many neurons are active."""
        return self.per_row[index]

    def known_counts(self, index: torch.Tensor) -> torch.Tensor | None:
        """Return the same."""
        return self.per_row[index]

    def codes_at(self, index: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Return the codes of the rows (n,) int64, see `ShardedRows.codes_at`."""
        total = int(counts.sum())
        first = self._gather("starts", index) - sent(counts.cumsum(0) - counts, self.device)
        positions = torch.repeat_interleave(first, sent(counts, self.device), output_size=total)
        positions += torch.arange(total, device=self.device)
        return codes_at(self._piece.importance, positions, self.importance_bits)

    def _gather(self, name: str, index: torch.Tensor) -> torch.Tensor:
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"rows {int(index.min())} to {int(index.max())} of {len(self)}")
        part: torch.Tensor = getattr(self._piece, name)
        return part[sent(index, self.device)]


class StreamedRows(ShardedRows):
    """Rows of mapped files that are taken to a device a part at a time, the next ones ahead."""

    def __init__(self, device: torch.device, *pieces: LayerRows) -> None:
        """Name the device, and take the pieces."""
        super().__init__(*pieces)
        self._device = device
        # One for all parts: a stream's memory is kept for it, and not given to others.
        self._beside = Beside(device)

    @property
    def device(self) -> torch.device:
        """Where parts are taken to."""
        return self._device

    def parts(self, index: torch.Tensor, size: int) -> Iterator[tuple[ShardedRows, torch.Tensor]]:
        """Yield the rows (n,) int64 in parts that are on the device."""
        beside = self._beside

        def take(part: torch.Tensor) -> ResidentRows:
            with beside.apart():
                rows = moved([self._taken(part)], self._device)
                if not torch.isfinite(rows.pieces[0].inputs).all():
                    self.inputs_at(part)  # names the file
            return rows

        for rows in made_ahead(take, torch.split(index, size)):
            beside.taken(*_tensors(rows.pieces[0]))
            yield rows, torch.arange(len(rows))

    def _taken(self, index: torch.Tensor) -> LayerRows:
        """Return the rows as a piece of their own, their first file for all of them."""
        bits, active = self.importance_bits, self.active_at(index)
        scale, codes = torch.zeros(0), torch.zeros(0, dtype=torch.uint8)
        if bits:
            scale = self.scale_at(index)
            codes = self.codes_at(index, count_active(active))
            codes = torch.from_numpy(pack_codes(codes.numpy(), bits))
        return LayerRows(
            inputs=self._gather("inputs", index),
            active=active,
            counts=self.counts,
            importance_bits=bits,
            scale=scale,
            starts=torch.zeros(0, dtype=torch.int64),
            importance=codes,
            file=self.pieces[0].file,
        )


def rows_for(
    device: torch.device, pieces: Sequence[LayerRows], counted: Callable[[], Sequence[LayerRows]]
) -> ShardedRows:
    """Return a layer's rows for a device: in its memory if they leave enough of it free.

    Args:
        device: a GPU.
        pieces: mapped, without `starts`.
        counted: gives them with `starts`.

    Raises:
        TraceError: as `resident`.
    """
    held = sum(tensor.nbytes for piece in pieces for tensor in _tensors(piece))
    if held <= _SHARE * free_gpu_memory(device):
        return resident(pieces, device)
    return StreamedRows(device, *counted())


def resident(pieces: Sequence[LayerRows], device: torch.device) -> ResidentRows:
    """Read all rows of a layer into the memory of a device.

    Args:
        pieces: mapped, their `starts` not needed.
        device: any.

    Raises:
        TraceError: inputs that are NaN or infinite, or active bits that contradict the counts; it
            names the file.
    """
    rows = moved(pieces, device)
    sizes = [len(piece.inputs) for piece in pieces]
    parts = torch.split(rows.pieces[0].inputs, sizes)
    finite = torch.stack([torch.isfinite(part).all() for part in parts]).tolist()
    for piece, sound, counts in zip(pieces, finite, torch.split(rows.per_row, sizes), strict=True):
        if not sound:
            raise damaged_inputs(piece.file)
        check_counts(piece.file, counts, piece.counts)
    return rows


def moved(pieces: Sequence[LayerRows], device: torch.device) -> ResidentRows:
    """Do the same without a look at what the rows hold."""
    staging = Staging(device)

    def joined(name: str) -> torch.Tensor:
        parts: list[torch.Tensor] = [getattr(piece, name) for piece in pieces]
        sizes = list(map(len, parts))
        shape = (sum(sizes), *parts[0].shape[1:])
        whole = torch.empty(shape, dtype=parts[0].dtype, device=device)
        for part, place in zip(parts, torch.split(whole, sizes), strict=True):
            staging.send(part, place)
        return whole

    whole = {name: joined(name) for name in ("inputs", "active", "scale", "importance")}
    per_row = count_active(whole["active"]).cpu()
    piece = LayerRows(
        counts=torch.stack([piece.counts for piece in pieces]).sum(0),
        importance_bits=pieces[0].importance_bits,
        starts=sent(_starts(pieces, per_row), device),
        file=pieces[0].file,
        **whole,
    )
    return ResidentRows(piece, per_row)


def _starts(pieces: Sequence[LayerRows], per_row: torch.Tensor) -> torch.Tensor:
    """Return where each row's codes begin among all; those of a piece begin with a byte."""
    bits = pieces[0].importance_bits
    if not bits:
        return torch.zeros(0, dtype=torch.int64)
    starts, before = [], 0
    for piece, counts in zip(
        pieces, torch.split(per_row, [len(piece.inputs) for piece in pieces]), strict=True
    ):
        starts.append(counts.cumsum(0) - counts + before)
        before += 8 // bits * len(piece.importance)
    return torch.cat(starts)


def _tensors(piece: LayerRows) -> list[torch.Tensor]:
    """Return what of a piece is on the device."""
    return [piece.inputs, piece.active, piece.scale, piece.starts, piece.importance]
