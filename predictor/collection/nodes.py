"""Collection on a Ray cluster: each shard is recorded by a worker, and counted by this process.

Windows are cut here and go to whichever worker is free; what it records it writes beside the
store, and this process puts it in its place, shard after shard. So nothing of size passes through
this process, and the store is that of one machine, byte for byte where it computes with as many
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from architectures.checkpoint import Checkpoint
from architectures.memory import model_memory
from architectures.model import load_model
from architectures.model_files import hashed_meanwhile, weight_files
from architectures.tokenizer import Tokenizer
from cluster.nodes import Worker, first_that_fits
from cluster.pool import several_on_nodes
from cluster.session import cluster_for, path_on_nodes
from cluster.watch import Watch
from cluster.worker import Tell, Work
from common.errors import TraceError
from predictor.collection.recorder import Recorder, read_down_norms, read_layer_weights
from predictor.collection.settings import CollectConfig
from predictor.collection.text import Text, TextShard, token_bar
from predictor.collection.windows import cut_batches
from predictor.collection.writing import AtOnce, Meanwhile, Segments
from predictor.traces.manifest import TraceHeader
from predictor.traces.shard_file import INPUT_DTYPES, ShardWriter
from predictor.traces.staging import StagedFile, stage_shard, stage_weights
from predictor.traces.store import TraceStore, shard_layout

Item = int | TextShard
"""A layer, whose weights are to be written, or a shard."""

Files = Mapping[int, StagedFile]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a worker knows of the run.

    Attributes:
        model: the model, as every node can open it.
        header: of the store.
        parts: directory for the workers' files.
        device: where to compute.
        weights: see `load_model`.
    """

    model: str
    header: TraceHeader
    parts: Path
    device: str
    weights: str


class Collection:
    """A collection on a cluster that can do it."""

    def __init__(self, run: _Run, worker: Worker, verbose: bool) -> None:
        """Name the run, and what a worker takes of a node."""
        self._run, self._worker, self._verbose = run, worker, verbose

    def record(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        store: TraceStore,
        report: Callable[[str], None],
    ) -> None:
        """Record what is missing in a store and mark it complete; see `collect.record`."""
        header = store.header
        text = Text(header, tokenizer)
        layers = () if store.progress.weights else header.layers
        items: Iterator[Item] = chain(layers, text.missing(store, ahead=True))
        with hashed_meanwhile(checkpoint) as files, token_bar(store) as bar:
            watch = Watch(bar, report, what="items", named=_named, verbose=self._verbose)
            weights: list[StagedFile] = []
            for item, made in several_on_nodes(
                partial(_recording, self._run),
                items,
                self._worker,
                watch,
                most=len(layers) + -(-(header.tokens - store.rows) // header.shard_rows),
                ordered=True,
            ):
                if isinstance(item, TextShard):
                    store.adopt(item.segments, item.text_sha256, made)
                    bar.update(item.rows)
                else:
                    weights.append(made[item])
                    if len(weights) == len(layers):
                        store.adopt_weights(weights)
        text.finish(store, files.result(), report)


@contextmanager
def collection_on_nodes(
    config: CollectConfig,
    checkpoint: Checkpoint,
    header: TraceHeader,
    note: Callable[[str], None],
) -> Iterator[Collection]:
    """Start or reach a cluster that can collect.

    Args:
        config: settings, with the workers' device.
        checkpoint: the model.
        header: of the store.
        note: takes lines for the user.

    Raises:
        ClusterError: there is no cluster, or its nodes lack room, versions or files.
    """
    assert config.ray is not None
    blocks = max(header.layers) + 1

    def takes(blocks: int) -> Worker:
        memory = model_memory(
            checkpoint,
            getattr(torch, header.compute_dtype),
            blocks=blocks,
            windows=header.batch,
            context=header.context,
            head=False,
        )
        return Worker(cpus=config.ray_cpus, gpus=config.ray_gpus, memory=memory)

    def chosen() -> Worker:
        if config.ray_gpus or config.weights == "streamed":
            return takes(1)
        whole = takes(blocks)
        return first_that_fits(whole, *[takes(1)] * (config.weights == "auto"))

    read = weight_files(checkpoint)
    with cluster_for(config.ray, chosen, read=read, out=config.out, note=note) as (worker, parts):
        weights = config.weights
        if weights == "auto" and not config.ray_gpus:
            weights = "resident" if worker == takes(blocks) else "streamed"
        if weights == "streamed":
            note("weights: streamed block by block, no node's memory holds the model")
        run = _Run(
            model=path_on_nodes(config.model),
            header=header,
            parts=parts,
            device=config.device,
            weights=weights,
        )
        yield Collection(run, worker, config.verbose)


def _named(item: Item) -> str:
    return f"shard {item.number}" if isinstance(item, TextShard) else f"weights of layer {item}"


class _Staging:
    """Stands for the store in a worker; see `predictor.collection.writing.Sharded`."""

    def __init__(self, run: _Run, number: int) -> None:
        self.header, self.next_shard, self._parts = run.header, number, run.parts
        self.files: Files = {}

    @contextmanager
    def shard(
        self,
        segments: Segments,
        text_sha256: str,
        before: Callable[[], object] = lambda: None,
        number: int | None = None,
    ) -> Iterator[dict[int, ShardWriter]]:
        layout = shard_layout(self.header, sum(rows for _, rows in segments))
        with stage_shard(self._parts, self.next_shard, self.header.layers, layout) as both:
            writers, self.files = both
            yield writers


def _recording(run: _Run) -> Work[Item, Files]:
    """Load the model and return what a worker does.

    Raises:
        TraceError: this node's model is another one.
    """
    header, checkpoint = run.header, Checkpoint.open(run.model)
    if checkpoint.fingerprint != header.model_fingerprint:
        raise TraceError(f"{run.model}: another model on a node", "use the same on every node")
    torch.manual_seed(header.seed)
    model = load_model(
        checkpoint,
        dtype=getattr(torch, header.compute_dtype),
        device=run.device,
        n_blocks=max(header.layers) + 1,
        weights=run.weights,
        head=False,
    )
    recorder = Recorder(
        model,
        checkpoint,
        {layer: read_down_norms(checkpoint, layer) for layer in header.layers},
        dtype=INPUT_DTYPES[header.input_dtype],
        importance_bits=header.importance_bits,
    )

    def record(item: Item, tell: Tell) -> Files:
        if not isinstance(item, TextShard):
            weights = read_layer_weights(checkpoint, item)
            return {item: stage_weights(run.parts, item, weights)}
        staging = _Staging(run, item.number)
        with (
            AtOnce(staging) if recorder.at_once else Meanwhile(staging) as writing,
            writing.shard(item.segments, item.text_sha256) as sink,
        ):
            for batch in cut_batches(item.windows, header.batch * header.context):
                recorder.run(batch, sink)
                tell(sum(len(window.tokens) for window in batch))
            recorder.flush()
        return staging.files

    return record
