"""Rows of a layer, made on a device beside the model that runs there.

Nothing of the model waits for them. They are begun when the layer is there: packed, counted, and
sent on their way to the CPU. How many neurons are active, which importance takes room by, is asked
for later, when it has long arrived; then they are finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import and_

import torch

from predictor.traces.packing import (
    encode_importance,
    pack_codes_on_device,
    pack_on_device,
    true_places,
)
from predictor.traces.shard_file import BatchRows
from predictor.traces.transfer import Beside, Done, fetched

Arriving = Callable[[], BatchRows]
"""Gives rows, waiting until they are on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a model does in a layer on a batch, on the device.

    Attributes:
        residual: (..., d_model), the predictor's input.
        taps: (..., d_ff) each, activations that must all let a neuron through.
        product: (..., d_ff), the FFN's intermediate act(g)·u.
        norms: (d_ff,) float32, norms of the down columns.
        chosen: (rows,) int64, places of the rows that are not padding; None where all are.
    """

    residual: torch.Tensor
    taps: Sequence[torch.Tensor]
    product: torch.Tensor
    norms: torch.Tensor
    chosen: torch.Tensor | None

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of (..., n) that are not padding, (rows, n)."""
        flat = x.reshape(-1, x.shape[-1])
        return flat if self.chosen is None else flat[self.chosen]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is used of the model's."""
        chosen = [] if self.chosen is None else [self.chosen]
        return [self.residual, *self.taps, self.product, *chosen]


@dataclass(frozen=True, kw_only=True)
class Begun:
    """Rows of which importance is missing.

    Attributes:
        layer: what they are of.
        told: (2,) int64 on the CPU once `ready`: active neurons, and whether all inputs fit.
        ready: tells when.
        stored: (rows, d_model), inputs in the stored type, on the device.
        active: (rows, d_ff) bool, on the device.
        product: (rows, d_ff), on the device.
        inputs: as in `BatchRows`, on the CPU later.
        packed: likewise.
        counts: likewise.
    """

    layer: Layer
    told: torch.Tensor
    ready: Done
    stored: torch.Tensor
    active: torch.Tensor
    product: torch.Tensor
    inputs: torch.Tensor
    packed: torch.Tensor
    counts: torch.Tensor


class RowMaker:
    """Makes rows of layers, one after the other."""

    def __init__(
        self,
        device: torch.device,
        passes: Callable[[torch.Tensor], torch.Tensor],
        *,
        dtype: torch.dtype,
        bits: int,
    ) -> None:
        """Name what they are made with.

        Args:
            device: where the model runs.
            passes: tells where an activation lets values through.
            dtype: stored type of the inputs.
            bits: of an active neuron's importance, 0 for none.
        """
        self._beside = Beside(device)
        self._passes, self._dtype, self._bits = passes, dtype, bits

    def begin(self, layer: Layer) -> Begun:
        """Begin a layer's rows, without waiting for anything."""
        with self._beside.after(*layer.tensors):
            stored = layer.select(layer.residual).to(self._dtype)
            active = reduce(and_, (self._passes(layer.select(t)) for t in layer.taps))
            counts = active.sum(0)
            sound = torch.isfinite(torch.stack(torch.aminmax(stored))).all()
            told = fetched(torch.stack([counts.sum(), sound.long()]))
            ready = self._beside.done()
            return Begun(
                layer=layer,
                told=told,
                ready=ready,
                stored=stored,
                active=active,
                product=layer.select(layer.product),
                inputs=fetched(stored),
                packed=fetched(pack_on_device(active)),
                counts=fetched(counts),
            )

    def finish(self, begun: Begun) -> Arriving:
        """Finish rows whose inputs fit, and return what gives them; `begun` must be `ready`."""
        scale, codes = torch.empty(0), torch.empty(0, dtype=torch.uint8)
        if self._bits:
            with self._beside.meanwhile(begun.product):
                places = true_places(begun.active, int(begun.told[0]))
                made = importance_of(
                    places, begun.active.sum(1), begun.product, begun.layer.norms, self._bits
                )
                scale, codes = map(fetched, made)
        rows = BatchRows(begun.inputs, begun.packed, begun.counts, scale, codes)
        return partial(_arrived, self._beside.done(), rows)


def importance_of(
    places: torch.Tensor,
    counts: torch.Tensor,
    product: torch.Tensor,
    norms: torch.Tensor,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's mean importance and the packed codes of its active neurons.

    Args:
        places: (active neurons,) int64 in (rows, d_ff), flattened, in order.
        counts: (rows,) int64, how many are in each row.
        product: (rows, d_ff), the FFN's intermediate act(g)·u.
        norms: (d_ff,) float32, norms of the down columns.
        bits: bits of a code.

    Returns:
        (rows,) float32 and (bytes,) uint8, on the device of all.
    """
    row = places // len(norms)
    values = product.reshape(-1)[places].abs().float() * norms[places - row * len(norms)]
    scale, codes = relative_codes(values, row, counts, bits)
    return scale, pack_codes_on_device(codes, bits)


def relative_codes(
    values: torch.Tensor, row: torch.Tensor, counts: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's mean importance and the codes of its active neurons, one a byte.

    Args:
        values: (active neurons,) float32, importance, row by row.
        row: (active neurons,) int64, ascending.
        counts: (rows,) int64, active neurons of each row.
        bits: bits of a code.

    Returns:
        (rows,) float32 and (active neurons,) uint8.
    """
    sums = torch.segment_reduce(values, "sum", lengths=counts, unsafe=True)
    scale = sums / counts.clamp_min(1)
    return scale, encode_importance(values / scale[row].clamp_min(1e-30), bits)


def _arrived(done: Done, rows: BatchRows) -> BatchRows:
    done.wait()
    return rows
