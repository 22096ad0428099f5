"""Collection on a Ray cluster: shards are recorded by workers, and counted by this process.

Windows are cut here and go to whichever worker is free; what it records it writes beside the
store, and this process puts it in its place, shard after shard. So nothing of size passes through
this process, and the store is that of one machine, byte for byte where it computes with as many
threads. A model that no node holds is a pipeline of stages, each with a range of its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from architectures.checkpoint import Checkpoint
from architectures.memory import model_memory
from architectures.model_files import hashed_meanwhile, weight_files
from architectures.tokenizer import Tokenizer
from cluster.nodes import Worker, first_that_fits, require_store, room_for
from cluster.pipeline import Pipeline, TooFewError, in_flight
from cluster.pool import several_on_nodes
from cluster.session import cluster_for, parts_beside, path_on_nodes
from cluster.watch import Watch
from common.urls import Url
from predictor.collection.recording import Files, Item, Recording, recording, stage_of
from predictor.collection.settings import CollectConfig
from predictor.collection.text import Text, TextShard, token_bar
from predictor.traces.manifest import TraceHeader
from predictor.traces.objects import Objects
from predictor.traces.place import Directory, Place
from predictor.traces.staging import StagedFile
from predictor.traces.store import TraceStore


@dataclass(frozen=True)
class _Held:
    """How workers hold the model.

    Attributes:
        worker: what each takes of a node.
        weights: see `load_model`.
        stages: ranges of its blocks, one after the other.
    """

    worker: Worker
    weights: str
    stages: tuple[range, ...]


class Collection:
    """A collection on a cluster that can do it."""

    def __init__(self, run: Recording, hold: Callable[[], _Held], verbose: bool) -> None:
        """Name the run.

        Args:
            run: what workers know of it.
            hold: chooses how they hold the model, by the room that there is.
            verbose: tell of every item.
        """
        self._run, self._hold, self._verbose = run, hold, verbose

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
        most = len(layers) + _shards(header, store.rows)
        with hashed_meanwhile(checkpoint) as files, token_bar(store) as bar:
            watch = Watch(bar, report, what="items", named=_named, verbose=self._verbose)
            weights: list[StagedFile] = []
            for item, made in self._made(items, watch, most):
                if isinstance(item, TextShard):
                    store.adopt(item.segments, item.text_sha256, made)
                    bar.update(item.rows)
                else:
                    weights.append(made[item])
                    if len(weights) == len(layers):
                        store.adopt_weights(weights)
        text.finish(store, files.result(), report)

    def _made(self, items: Iterator[Item], watch: Watch, most: int) -> Iterator[tuple[Item, Files]]:
        """Yield every item in order, with its files."""
        while True:
            held = self._hold()
            run = replace(self._run, weights=held.weights)
            runs = [replace(run, blocks=blocks) for blocks in held.stages]
            if len(runs) == 1:
                start = partial(recording, runs[0])
                yield from several_on_nodes(
                    start, items, held.worker, watch, most=most, ordered=True
                )
                return
            pipeline: Pipeline[Item, Files]
            with Pipeline(
                [partial(stage_of, each) for each in runs], held.worker, watch
            ) as pipeline:
                try:
                    for item, parts in pipeline.made(items):
                        yield item, {layer: file for part in parts for layer, file in part.items()}
                    return
                except TooFewError as error:
                    watch.note(f"{error.problem}; its blocks are spread anew")
                    items = chain(pipeline.unfinished, items)


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
    hold = partial(_held, config, checkpoint, header)

    def told() -> _Held:
        found = hold()
        if len(found.stages) > 1:
            require_store(in_flight(len(found.stages)) * handed)
            note(f"weights: in {len(found.stages)} stages of at most {len(found.stages[0])} blocks")
        elif found.weights == "streamed":
            note("weights: streamed block by block, the model does not stay in memory")
        return found

    handed = _handed_over(checkpoint, header)
    with (
        _parts(config.out) as parts,
        cluster_for(
            config.ray,
            lambda: hold().worker,
            read=weight_files(checkpoint),
            write=parts.where if isinstance(parts, Directory) else None,
            note=note,
            store=in_flight(header.n_layers) * handed if config.weights == PIPELINED else 0,
        ),
    ):
        run = Recording(
            model=path_on_nodes(config.model),
            header=header,
            parts=parts,
            device=config.device,
            weights=config.weights,
            blocks=range(max(header.layers) + 1),
        )
        yield Collection(run, told, config.verbose)


PIPELINED = "pipelined"
"""Weights as a pipeline of stages, of `--weights`."""


def _held(config: CollectConfig, checkpoint: Checkpoint, header: TraceHeader) -> _Held:
    """Choose how workers hold the model: whole, in as many stages as there is room for, or not.

    What a GPU holds is known to its own process alone: there it is whole or streamed, unless
    stages are asked for.
    """
    blocks = max(header.layers) + 1

    def takes(held: int) -> Worker:
        memory = model_memory(
            checkpoint,
            getattr(torch, header.compute_dtype),
            blocks=held,
            windows=header.batch,
            context=header.context,
            head=False,
        )
        return Worker(cpus=config.ray_cpus, gpus=config.ray_gpus, memory=memory)

    whole = (range(blocks),)
    if config.weights == "streamed":
        return _Held(takes(1), "streamed", whole)
    if config.weights != PIPELINED:
        if config.ray_gpus:
            return _Held(takes(1), config.weights, whole)
        if config.weights == "resident" or room_for(takes(blocks)):
            return _Held(takes(blocks), "resident", whole)
    most = min(blocks, _shards(header, 0))
    for stages in range(2, blocks + 1):
        worker = takes(1 if config.ray_gpus else -(-blocks // stages))
        if (room := room_for(worker)) >= stages:
            count = max(stages, min(room, most))
            return _Held(worker, "resident", cut(blocks, count))
    if config.weights == PIPELINED:
        first_that_fits(takes(1))
    return _Held(takes(1), "streamed", whole)


def cut(blocks: int, stages: int) -> tuple[range, ...]:
    """Return ranges of blocks, one after the other, as even as can be, the larger ones first."""
    size, more = divmod(blocks, stages)
    ends = [n * size + min(n, more) for n in range(stages + 1)]
    return tuple(map(range, ends, ends[1:]))


def _handed_over(checkpoint: Checkpoint, header: TraceHeader) -> int:
    """Return bytes that a stage hands over of a shard: the residuals of its windows, padded."""
    dtype: torch.dtype = getattr(torch, header.compute_dtype)
    return (header.shard_rows + 2 * header.context) * checkpoint.shape.d_model * dtype.itemsize


def _shards(header: TraceHeader, rows: int) -> int:
    """Return how many shards are missing at most."""
    return -(-(header.tokens - rows) // header.shard_rows)


@contextmanager
def _parts(out: Path | Url) -> Iterator[Place]:
    """Yield where workers write: beside a directory, or within a prefix of an object store."""
    if isinstance(out, Path):
        with parts_beside(out) as directory:
            yield Directory(directory)
        return
    store = Objects(out)
    try:
        yield store.parts()
    finally:
        store.remove_parts()


def _named(item: Item) -> str:
    return f"shard {item.number}" if isinstance(item, TextShard) else f"weights of layer {item}"
