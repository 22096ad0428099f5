"""What a worker of a collection does: it records shards, or its range of blocks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from architectures.checkpoint import Checkpoint
from architectures.model import load_model
from cluster.worker import Stage, Tell, Work
from common.errors import TraceError
from predictor.collection.recorder import Recorder, read_down_norms, read_layer_weights
from predictor.collection.text import TextShard
from predictor.collection.windows import cut_batches
from predictor.collection.writing import AtOnce, Meanwhile, Segments
from predictor.traces.manifest import TraceHeader
from predictor.traces.place import Place
from predictor.traces.shard_file import INPUT_DTYPES, ShardWriter
from predictor.traces.staging import StagedFile, stage_shard, stage_weights
from predictor.traces.store import shard_layout

Item = int | TextShard
"""A layer, whose weights are to be written, or a shard."""

Files = Mapping[int, StagedFile]
Residuals = list[npt.NDArray[Any]]
"""Of each batch, (windows, longest window, d_model) as bytes of the model's type."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a worker knows of the run.

    Attributes:
        model: the model, as every node can open it.
        header: of the store.
        parts: where workers write.
        device: where to compute.
        weights: see `load_model`.
        blocks: numbers of those that it runs.
    """

    model: str
    header: TraceHeader
    parts: Place
    device: str
    weights: str
    blocks: range


def recording(run: Recording) -> Work[Item, Files]:
    """Load the model and return what a worker does; see `_Recorder`."""
    recorder = _Recorder(run)

    def record(item: Item, tell: Tell) -> Files:
        files, _ = recorder.record(item, None, tell)
        return files

    return record


def stage_of(run: Recording) -> Stage[Item, Files]:
    """Load a range of blocks and return what a stage does; see `_Recorder`."""
    recorder = _Recorder(run)

    def record(item: Item, entering: Residuals | None) -> tuple[Files, Residuals | None]:
        return recorder.record(item, entering, lambda tokens: None)

    return record


class _Recorder:
    """Records those layers of a store that are among its blocks."""

    def __init__(self, run: Recording) -> None:
        """Load the model.

        Raises:
            TraceError: this node's model is another one.
        """
        header, checkpoint = run.header, Checkpoint.open(run.model)
        if checkpoint.fingerprint != header.model_fingerprint:
            raise TraceError(f"{run.model}: another model on a node", "use the same on every node")
        torch.manual_seed(header.seed)
        self._model = load_model(
            checkpoint,
            dtype=getattr(torch, header.compute_dtype),
            device=run.device,
            layers=run.blocks,
            weights=run.weights,
            head=False,
        )
        self._run, self._checkpoint = run, checkpoint
        self._layers = [layer for layer in header.layers if layer in run.blocks]
        self._last = run.blocks[-1] == max(header.layers)
        self._recorder = Recorder(
            self._model,
            checkpoint,
            {layer: read_down_norms(checkpoint, layer) for layer in self._layers},
            dtype=INPUT_DTYPES[header.input_dtype],
            importance_bits=header.importance_bits,
        )

    def record(
        self, item: Item, entering: Residuals | None, tell: Tell
    ) -> tuple[Files, Residuals | None]:
        """Write what there is of an item in these blocks.

        Args:
            item: a shard, or a layer whose weights are to be written.
            entering: a shard's residuals before the first block; None where that is block 0.
            tell: takes tokens as they are recorded.

        Returns:
            The files by layer, and the residuals behind the last block, None if nobody wants them.
        """
        if not isinstance(item, TextShard):
            if item not in self._layers:
                return {}, None
            weights = read_layer_weights(self._checkpoint, item)
            return {item: stage_weights(self._run.parts, item, weights)}, None
        header, left = self._run.header, Residuals()
        staging = _Staging(self._run, item.number, self._layers)
        batches = list(cut_batches(item.windows, header.batch * header.context))
        with (
            AtOnce(staging) if self._recorder.at_once else Meanwhile(staging) as writing,
            writing.shard(item.segments, item.text_sha256) as sink,
        ):
            for number, batch in enumerate(batches):
                before = None if entering is None else self._entered(entering[number])
                residual = self._recorder.run(batch, sink, before)
                if not self._last:
                    left.append(residual.cpu().contiguous().view(torch.uint8).numpy())
                tell(sum(len(window.tokens) for window in batch))
            self._recorder.flush()
        return staging.files, None if self._last else left

    def _entered(self, residual: npt.NDArray[np.uint8]) -> torch.Tensor:
        # What comes out of the object store may not be written to, which torch cannot promise.
        found = torch.from_numpy(residual.copy())
        return found.view(self._model.dtype).to(self._model.device)


class _Staging:
    """Stands for the store in a worker; see `predictor.collection.writing.Sharded`."""

    def __init__(self, run: Recording, number: int, layers: list[int]) -> None:
        self.layers, self.next_shard = tuple(layers), number
        self._header, self._parts = run.header, run.parts
        self.files: Files = {}

    @contextmanager
    def shard(
        self,
        segments: Segments,
        text_sha256: str,
        before: Callable[[], object] = lambda: None,
        number: int | None = None,
    ) -> Iterator[dict[int, ShardWriter]]:
        layout = shard_layout(self._header, sum(rows for _, rows in segments))
        with stage_shard(self._parts, self.next_shard, self.layers, layout) as both:
            writers, self.files = both
            yield writers
