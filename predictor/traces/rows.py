"""A layer's trace rows: gathered from the shards that hold them, in the form that training eats.

Shard files are mapped, not read, so a layer may have more rows than memory holds: a batch costs its
own size, and the system drops mapped pages when it needs their memory. What computes on a device
takes rows from its memory: see `predictor.traces.device_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.errors import COLLECT_AGAIN, TraceError
from common.urls import Url
from predictor.traces.packing import (
    codes_at,
    count_active,
    decode_importance,
    flat_places,
    unpack_active,
)

Places = npt.NDArray[np.int64]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_TINY = 1e-20


@dataclass(frozen=True)
class LayerRows:
    """Rows of one layer in one piece: those of a shard file, mapped.

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
    file: Path | Url


class ShardedRows:
    """Rows of one layer in one piece or several, one after the other, read by an index of rows.

    Attributes:
        pieces: at least one.
        counts: (d_ff,) int64, rows in which each neuron was active.
        importance_bits: bits of a code; 0 where no importance is stored.
    """

    def __init__(self, *pieces: LayerRows) -> None:
        """Take the pieces."""
        self.pieces = pieces
        self.counts = torch.stack([piece.counts for piece in pieces]).sum(0)
        self.importance_bits = pieces[0].importance_bits
        self._first = np.cumsum([0, *(len(piece.inputs) for piece in pieces)])

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._first[-1])

    @property
    def device(self) -> torch.device:
        """Where what is read comes out."""
        return torch.device("cpu")

    def parts(self, index: torch.Tensor, size: int) -> Iterator[tuple[ShardedRows, torch.Tensor]]:
        """Yield the rows (n,) int64 in parts of at most `size`, where they are computed with.

        Yields:
            Rows to read a part from, and its index in them.
        """
        for part in torch.split(index, size):
            yield self, part

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

    def places_at(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where the rows (n,) int64 are active.

        Returns:
            Places in (n, d_ff), flattened, and the row of each, (k,) int64 in order.
        """
        return flat_places(self.active_at(index), len(self.counts))

    def active_counts(self, index: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Return (n,) int64 on the CPU: how many neurons are active in the rows (n,) int64.

        Args:
            index: the rows.
            row: what `places_at` says of them.
        """
        return torch.bincount(row, minlength=len(index))

    def known_counts(self, index: torch.Tensor) -> torch.Tensor | None:
        """Return the same where it is known without looking."""
        return None

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
        for piece, places, local in self._split(index):
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
        for piece, places, local in self._split(index):
            part: torch.Tensor = getattr(piece, name)
            if array is None:
                gathered = torch.empty(len(index), *part.shape[1:], dtype=part.dtype)
                array = _as_numpy(gathered)
            # numpy copies rows straight to their places; torch would go by a temporary copy.
            array[places] = _as_numpy(part)[local]
        assert gathered is not None
        return gathered

    def _refuse_damaged(self, inputs: torch.Tensor, index: torch.Tensor) -> None:
        for piece, places, _ in self._split(index):
            if not torch.isfinite(inputs[places]).all():
                raise damaged_inputs(piece.file)

    def _split(self, index: torch.Tensor) -> Iterator[tuple[LayerRows, Places, Places]]:
        """Yield each piece that holds some of the rows, their places in `index` and in the piece.

        Pieces come in order, each with its rows in ascending order.

        Raises:
            IndexError: there is no such row.
        """
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


def damaged_inputs(file: Path | Url) -> TraceError:
    """Return the error about inputs that are no numbers."""
    return TraceError(
        f"{file}: inputs hold NaN or inf",
        "find what else is damaged with 'psp traces check', or collect the traces again",
    )


def check_counts(file: Path | Url, per_row: torch.Tensor, counts: torch.Tensor) -> None:
    """Refuse a file whose active bits, so many in each row, contradict its counts of neurons.

    Raises:
        TraceError: importance would be read from wrong places.
    """
    if per_row.sum() != counts.sum():
        raise TraceError(f"{file}: counts differ from the active bits", COLLECT_AGAIN)


def normalise_rms(inputs: torch.Tensor) -> torch.Tensor:
    """Scale every row (n, d_model) to unit root mean square."""
    lengths = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True)
    return inputs * torch.rsqrt(lengths.square_().div_(inputs.shape[-1]).add_(_TINY))


@dataclass(frozen=True)
class LayerWeights:
    """A layer's weights as seen from the predictor's input.

    Attributes:
        gate: (d_ff, d_model) float32, linear map from the predictor's input to the gate, but for
            the norm's division by the input's length and, where a model has them, biases.
        down_norms: (d_ff,) float32, norm of each column of the down projection.
    """

    gate: torch.Tensor
    down_norms: torch.Tensor


@dataclass(frozen=True)
class LabelledRows:
    """A layer's rows with labels cut to the largest magnitudes if asked for.

    Attributes:
        rows: the rows as stored.
        weights: the layer's weights.
        normalise: scale inputs to unit root mean square.
        top: keep at most this many labels a token, those of largest magnitude; 0 keeps all.
    """

    rows: ShardedRows
    weights: LayerWeights
    normalise: bool
    top: int = 0

    @property
    def d_ff(self) -> int:
        """Neurons of the layer."""
        return len(self.weights.down_norms)

    @property
    def device(self) -> torch.device:
        """Where rows come out and are computed with."""
        return self.rows.device

    def parts(self, index: torch.Tensor, size: int) -> Iterator[tuple[LabelledRows, torch.Tensor]]:
        """Yield the rows (n,) int64 in parts, see `ShardedRows.parts`."""
        for rows, part in self.rows.parts(index, size):
            yield self if rows is self.rows else replace(self, rows=rows), part

    def at_hand(self, index: torch.Tensor) -> tuple[LabelledRows, torch.Tensor]:
        """Return rows to read the rows (n,) int64 from, and their index in them."""
        return next(self.parts(index, max(1, len(index))))

    def inputs(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n, d_model) float32 inputs of the chosen rows, scaled if asked for.

        Raises:
            TraceError: some are NaN or infinite.
        """
        inputs = self.rows.inputs_at(index)
        return normalise_rms(inputs) if self.normalise else inputs

    def active(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n, d_ff) bool labels of the chosen rows, uncut."""
        return unpack_active(self.rows.active_at(index), self.d_ff)

    def importance(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n, d_ff) float32 |act(g)·u|·‖down column‖ as stored, zero where not active."""
        dense = torch.zeros(len(index), self.d_ff, device=self.device)
        places, values = self._active(index, importance=True)
        dense.view(-1)[places] = values
        return dense

    def positives(
        self, index: torch.Tensor, *, importance: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the labels to train on as places, a few per cent of all.

        Args:
            index: (n,) int64, the chosen rows.
            importance: whether importance is wanted.

        Returns:
            Places in (n, d_ff), flattened, (k,) int64 in order, and the importance at each, (k,)
            float32, empty if not wanted.
        """
        places, values = self._active(index, importance=importance or bool(self.top))
        if not self.top:
            return places, values
        magnitude = torch.zeros(len(index), self.d_ff, device=self.device)
        norms = self.weights.down_norms.to(self.device)
        neuron_norms = norms.clamp_min(1e-30)[places % self.d_ff]
        magnitude.view(-1)[places] = values / neuron_norms
        largest = magnitude.topk(self.top, dim=1).indices
        kept = torch.zeros_like(magnitude, dtype=torch.bool).scatter_(1, largest, True)
        chosen = (kept & (magnitude > 0)).view(-1)[places]
        return places[chosen], values[chosen]

    def positives_within(
        self, index: torch.Tensor, places: torch.Tensor, ends: Sequence[int]
    ) -> list[int]:
        """Return how many of the labels to train on are in the first so many rows.

        Args:
            index: (n,) int64, the chosen rows.
            places: what `positives` says of them.
            ends: numbers of rows, more than n too.
        """
        counts = None if self.top else self.rows.known_counts(index)
        if counts is None:
            limits = torch.tensor(ends).to(places.device) * self.d_ff
            return list(map(int, torch.searchsorted(places, limits).tolist()))
        sums = [0, *counts.cumsum(0).tolist()]
        return [sums[min(end, len(index))] for end in ends]

    def _active(
        self, index: torch.Tensor, *, importance: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        places, row = self.rows.places_at(index)
        if not importance:
            return places, torch.empty(0, device=places.device)
        codes = self.rows.codes_at(index, self.rows.active_counts(index, row))
        relative = decode_importance(codes, self.rows.importance_bits)
        return places, relative * self.rows.scale_at(index)[row]

    def contributions(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what each active neuron adds to the residual stream.

        Args:
            index: (n,) int64, the chosen rows.

        Returns:
            Places of active neurons in (n, d_ff), uncut, flattened, (k,) int64 in order, and at
            each importance² / ‖x‖², (k,) float32: what is added, squared, relative to the stream's
            own square, whatever `normalise` says.

        Raises:
            TraceError: some inputs are NaN or infinite.
        """
        places, importance = self._active(index, importance=True)
        squares = self.rows.inputs_at(index).square().sum(1).clamp_min(_TINY)
        return places, importance.square_().div_(squares[places // self.d_ff])


def counted(piece: LayerRows) -> LayerRows:
    """Find where each row's importance begins.

    Raises:
        TraceError: as `check_counts`.
    """
    if not piece.importance_bits:
        return piece
    per_row = count_active(piece.active)
    check_counts(piece.file, per_row, piece.counts)
    return replace(piece, starts=torch.cumsum(per_row, 0) - per_row)
