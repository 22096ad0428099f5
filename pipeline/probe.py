"""A short trial on this machine: one layer's traces and training, and what memory and disk give.

The very code of `psp collect` and `psp train-predictor` runs on a few windows of the text, for the
first layer alone, into a directory that goes again.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import TypeVar

import torch

from architectures.checkpoint import Checkpoint
from architectures.model import load_model
from common.files import write_error
from common.scratch import Scratch
from common.units import MIB
from cost_model.measure import cpu_bandwidths
from pipeline.steps import StepSettings
from predictor.collection.collect import record, trace_header
from predictor.traces.manifest import TraceHeader
from predictor.traces.store import TraceStore
from predictor.training.settings import TrainConfig, possible_sizes
from predictor.training.trainer import layer_trainer

Made = TypeVar("Made")
_TOKENS = 2048
_WARM_UP = 32
_READ = 64 * MIB
_WRITTEN = 32 * MIB


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured.

    Attributes:
        load_layer: seconds to read a layer's weights.
        token_layer: seconds that a token takes in a layer, recorded.
        row_bytes: of a token in a layer on disk.
        sparsity: share of neurons that were not active in the first layer.
        layer_fixed: seconds that a layer's training takes whatever its rows.
        layer_row: seconds that a row adds, all epochs together.
        jobs: layers that are trained at once.
        write: bytes a second to the disk of the output.
        read: bytes a second from memory.
    """

    load_layer: float
    token_layer: float
    row_bytes: float
    sparsity: float
    layer_fixed: float
    layer_row: float
    jobs: int
    write: float
    read: float


def probe(checkpoint: Checkpoint, settings: StepSettings, template: str, place: Path) -> Rates:
    """Try out the first layer.

    Args:
        checkpoint: the model, opened with ReLU.
        settings: of the commands.
        template: chat template of the text.
        place: existing directory on the disk of the output; nothing stays there.

    Raises:
        PspError: as the two commands.
    """
    collect = settings.collect
    with _scratch(place) as scratch:
        small = replace(
            collect, out=scratch / "traces", tokens=min(collect.tokens, _TOKENS), layers=(0,)
        )
        header = trace_header(small, checkpoint, template)
        # The first time anything runs it takes longer, which is no cost of a token.
        first = replace(header, tokens=min(header.tokens, _WARM_UP))
        _, load, _ = _recorded(checkpoint, first, scratch / "first", collect.device)
        store, _, recorded = _recorded(checkpoint, header, small.directory, collect.device)
        shards = store.path.rglob("shard-*.safetensors")
        row_bytes = sum(file.stat().st_size for file in shards) / store.rows
        fixed, row, jobs = _training(store, settings.train)
        write = _written(scratch)
        sparsity = store.activation_sparsity()[0]
    return Rates(
        load_layer=load,
        token_layer=recorded / store.rows,
        row_bytes=row_bytes,
        sparsity=sparsity,
        layer_fixed=fixed,
        layer_row=row,
        jobs=jobs,
        write=write,
        read=cpu_bandwidths(1, _READ)[0],
    )


def _recorded(
    checkpoint: Checkpoint, header: TraceHeader, out: Path, device: str
) -> tuple[TraceStore, float, float]:
    """Record the first layer; return the store, and the seconds of loading and of recording."""
    model, load = _timed(
        partial(
            load_model,
            checkpoint,
            dtype=getattr(torch, header.compute_dtype),
            device=device,
            layers=range(1),
            weights="resident",
            head=False,
        )
    )
    store, tokenizer = TraceStore.create(out, header), checkpoint.tokenizer()
    _, recorded = _timed(partial(record, model, checkpoint, tokenizer, store))
    return store, load, recorded


@contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    try:
        with Scratch(place, ".psp-probe-") as path:
            yield path
    except OSError as error:
        raise write_error(place, error) from error


def _timed(work: Callable[[], Made]) -> tuple[Made, float]:
    begun = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begun


def _training(store: TraceStore, train: TrainConfig) -> tuple[float, float, int]:
    """Return seconds of a layer and of each of its rows, and how many layers go at once."""
    held = torch.arange(store.rows) >= (1 - train.holdout) * store.rows
    trainer = layer_trainer(replace(train, traces=store.path), store, held)
    bounded, ranks = trainer.bound is not None, range(len(train.fixed_ranks) or 1)
    sizes = (possible_sizes(train, store.header.d_model, n, bounded=bounded) for n in ranks)
    largest = max(chain.from_iterable(sizes), key=lambda size: size.rank)
    rows, epochs = len(trainer.train), max(trainer.recipe.epochs, 1)
    steps: list[float] = []
    stepped = partial(_clocked, steps)
    _, seconds = _timed(lambda: trainer.run(0, largest, stepped, _nothing))
    pauses = [after - before for before, after in pairwise(steps)]
    if not pauses:
        return seconds, 0.0, trainer.jobs
    step = statistics.median(pauses)
    row = step * epochs / min(trainer.recipe.batch, rows)
    return max(seconds - step * len(steps), 0.0), row, trainer.jobs


def _clocked(steps: list[float], number: int) -> None:
    steps.append(time.perf_counter())


def _nothing(value: object) -> None:
    """Take what nobody wants to know."""


def _written(scratch: Path) -> float:
    file = scratch / "written"
    data = os.urandom(_WRITTEN)

    def write() -> None:
        with file.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    return _WRITTEN / _timed(write)[1]
