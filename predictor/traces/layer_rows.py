"""A layer's trace rows, gathered from the shards that hold them.

Shard files are mapped, not read, so a layer may have more rows than memory holds: a batch costs its
own size, and the system drops mapped pages when it needs their memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.errors import TraceError
from predictor.traces.packing import codes_at

Places = npt.NDArray[np.int64]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class StoredRows(ABC):
    """Rows of one layer, in one piece or in several, read by an index of rows.

    Attributes:
        counts: (d_ff,) int64, rows in which each neuron was active.
        importance_bits: bits of a code; 0 where no importance is stored.
    """

    counts: torch.Tensor
    importance_bits: int

    @abstractmethod
    def split(self, index: torch.Tensor) -> Iterator[tuple[LayerRows, Places, Places]]:
        """Yield each piece that holds some of the rows, their places in `index` and in the piece.

        Raises:
            IndexError: there is no such row.
        """

    def inputs_at(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n, d_model) float32 inputs of the rows (n,) int64.

        Raises:
            TraceError: some are NaN or infinite; it names their file.
        """
        inputs = self._gather("inputs", index).float()
        # One pass that makes nothing; only a sum that is off, which may be but too large, is
        # worth another look.
        if not math.isfinite(inputs.sum()):
            self._refuse_damaged(inputs, index)
        return inputs

    def active_at(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n, ceil(d_ff / 8)) uint8 active bits of the rows (n,) int64."""
        return self._gather("active", index)

    def scale_at(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n,) float32 mean importance of the active neurons of the rows (n,) int64."""
        return self._gather("scale", index)

    def codes_at(self, index: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Return the uint8 codes of the rows (n,) int64, which have `counts` (n,) int64, in order.

        A row's codes are those of its active neurons, see `predictor.traces.packing`.
        """
        each, lengths = 8 // self.importance_bits, counts.numpy()
        taken: list[npt.NDArray[np.uint8]] = [np.zeros(0, np.uint8)] * len(index)
        skipped = np.zeros(len(index), np.int64)
        for piece, places, local in self.split(index):
            starts, stored = piece.starts.numpy()[local], piece.importance.numpy()
            ends = -(-(starts + lengths[places]) // each)
            skipped[places] = starts % each
            for place, low, high in zip(places, starts // each, ends, strict=True):
                taken[place] = stored[low:high]
        sizes = np.array([len(part) for part in taken], np.int64)
        # Whole bytes were taken: the codes before a row's first one belong to another row.
        first = (np.cumsum(sizes) - sizes) * each + skipped
        steps = first - (np.cumsum(lengths) - lengths)
        positions = np.repeat(steps, lengths) + np.arange(lengths.sum())
        together = torch.from_numpy(np.concatenate([*taken, np.zeros(0, np.uint8)]))
        return codes_at(together, torch.from_numpy(positions), self.importance_bits)

    def _gather(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Copy the rows of one part into one tensor, in the order of the index."""
        gathered = array = None
        for piece, places, local in self.split(index):
            part: torch.Tensor = getattr(piece, name)
            if array is None:
                gathered = torch.empty(len(index), *part.shape[1:], dtype=part.dtype)
                array = _as_numpy(gathered)
            # numpy copies rows straight to their places; torch would go by a temporary copy.
            array[places] = _as_numpy(part)[local]
        assert gathered is not None
        return gathered

    def _refuse_damaged(self, inputs: torch.Tensor, index: torch.Tensor) -> None:
        for piece, places, _ in self.split(index):
            if not torch.isfinite(inputs[places]).all():
                raise TraceError(
                    f"{piece.file or 'traces'}: inputs hold NaN or inf",
                    "find what else is damaged with 'psp traces check', or collect the traces "
                    "again",
                )


@dataclass(frozen=True)
class LayerRows(StoredRows):
    """Rows of one layer in one piece: those of a shard file, mapped, or rows in memory.

    Attributes:
        inputs: (rows, d_model) float16 or bfloat16, the predictor's input.
        active: (rows, ceil(d_ff / 8)) uint8, bit-packed, least significant bit first.
        counts: (d_ff,) int64, rows in which each neuron was active.
        importance_bits: bits of a code; 0 where no importance is stored.
        scale: (rows,) float32, mean importance of a row's active neurons, or empty.
        starts: (rows,) int64, position of each row's first code, or empty.
        importance: (bytes,) uint8, packed codes, see `predictor.traces.packing`.
        file: the file that holds the rows, for errors.
    """

    inputs: torch.Tensor
    active: torch.Tensor
    counts: torch.Tensor
    importance_bits: int
    scale: torch.Tensor
    starts: torch.Tensor
    importance: torch.Tensor
    file: Path | None = None

    def split(self, index: torch.Tensor) -> Iterator[tuple[LayerRows, Places, Places]]:
        """Yield this piece with all places."""
        yield self, np.arange(len(index)), index.numpy()


class ShardedRows(StoredRows):
    """Rows of one layer in several pieces, one after the other."""

    def __init__(self, pieces: list[LayerRows]) -> None:
        """Take at least one piece."""
        self.pieces = pieces
        self.counts = torch.stack([piece.counts for piece in pieces]).sum(0)
        self.importance_bits = pieces[0].importance_bits
        self._first = np.cumsum([0, *(len(piece.inputs) for piece in pieces)])

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._first[-1])

    def split(self, index: torch.Tensor) -> Iterator[tuple[LayerRows, Places, Places]]:
        """Yield the pieces in order, each with its rows in ascending order."""
        order = np.argsort(index.numpy(), kind="stable")
        rows = index.numpy()[order]
        if len(rows) and not 0 <= rows[0] <= rows[-1] < len(self):
            raise IndexError(f"rows {rows[0]} to {rows[-1]} of {len(self)}")
        cuts = np.searchsorted(rows, self._first)
        for number, piece in enumerate(self.pieces):
            part = slice(cuts[number], cuts[number + 1])
            # Without rows the first piece still tells shapes.
            if part.start < part.stop or not len(rows) + number:
                yield piece, order[part], rows[part] - self._first[number]


def _as_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Return the same memory to numpy, which knows no bfloat16."""
    array: npt.NDArray[Any] = tensor.view(_BITS[tensor.element_size()]).numpy()
    return array
