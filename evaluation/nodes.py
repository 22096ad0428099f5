"""Arms on a Ray cluster: workers hold an arm's model, and batches go to whichever is free."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from architectures.memory import model_memory
from architectures.model import OutOfMemory
from architectures.model_files import weight_files
from cluster.nodes import Worker
from cluster.pool import Pool
from cluster.session import cluster_for, path_on_nodes
from cluster.settings import worker_device
from cluster.watch import Watch
from cluster.worker import Tell, Work
from common.errors import EngineError
from evaluation.arms import Arm, ArmFacts, Arms
from evaluation.backends.backend import Answered, Backend, Decoding, Prompt, RequestKind, Scoring
from evaluation.settings import EvaluateConfig

Batch = Sequence[Scoring] | Sequence[Prompt]


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What a worker tells of its arm once the model is loaded."""

    facts: ArmFacts
    kinds: tuple[RequestKind, ...]
    why_not: str
    max_length: int


@dataclass(frozen=True)
class _Item:
    """A batch for an arm to answer; without one, the question what the arm is."""

    arm: Arm
    number: int
    batch: Batch = ()
    decoding: Decoding | None = None


class NodesBackend:
    """An arm whose batches are answered by workers; see `Asker`."""

    def __init__(self, arm: Arm, pool: Pool[_Item, Any], watch: Watch) -> None:
        """Let a worker open the arm.

        Args:
            arm: with paths that lead to the same from everywhere.
            pool: the workers.
            watch: tells of their work.

        Raises:
            PspError: it cannot be loaded.
        """
        self._arm, self._pool, self._watch = arm, pool, watch
        [(_, known)] = pool.made([_Item(arm, 0)], watch)
        self._known: _Known = known

    @property
    def facts(self) -> ArmFacts:
        """What results say of the arm."""
        return self._known.facts

    @property
    def kinds(self) -> Sequence[RequestKind]:
        """See `Backend`."""
        return self._known.kinds

    @property
    def why_not(self) -> str:
        """See `Backend`."""
        return self._known.why_not

    @property
    def max_length(self) -> int:
        """See `Backend`."""
        return self._known.max_length

    def several(
        self, batches: Sequence[Batch], decoding: Decoding | None
    ) -> Iterator[tuple[int, Answered]]:
        """See `Spread`."""
        items = [_Item(self._arm, n, batch, decoding) for n, batch in enumerate(batches)]
        for item, answered in self._pool.made(items, self._watch):
            yield item.number, answered

    def close(self) -> None:
        """Leave the workers to the next arm."""


_MOST = 1 << 16
"""Workers: as many as there is room for."""


@contextmanager
def arms_on_nodes(
    config: EvaluateConfig, arms: Arms, note: Callable[[str], None]
) -> Iterator[Callable[[Arm], tuple[NodesBackend, ArmFacts]]]:
    """Start or reach a cluster that can answer.

    Args:
        config: settings.
        arms: checked; those of checkpoints can be opened.
        note: takes lines for the user.

    Yields:
        What opens an arm.

    Raises:
        ClusterError: there is no cluster, or its nodes lack room, versions or files.
    """
    assert config.ray is not None
    device = worker_device(config.device, config.ray_gpus)
    spread = [_everywhere(arm) for arm in arms.arms if arm.file is None]
    models = [arms.model(arm).checkpoint for arm in arms.arms if arm.file is None]
    worker = Worker(
        cpus=config.ray_cpus,
        gpus=config.ray_gpus,
        memory=max(_memory(config, model) for model in models),
    )
    read = [file for model in models for file in weight_files(model)]
    start = partial(_answering, spread, device, config.dtype)
    pool: Pool[_Item, Any]
    with (
        cluster_for(config.ray, worker, read=read, note=note),
        Pool(start, worker, most=_MOST) as pool,
        tqdm(disable=True) as bar,
    ):
        watch = Watch(bar, note, what="batches", named=_named, verbose=config.verbose, each=False)

        def opened(arm: Arm) -> tuple[NodesBackend, ArmFacts]:
            backend = NodesBackend(_everywhere(arm), pool, watch)
            return backend, backend.facts

        yield opened


def _everywhere(arm: Arm) -> Arm:
    """Return an arm whose paths lead to the same from everywhere."""
    predictors = None if arm.predictors is None else arm.predictors.absolute()
    return replace(arm, model=path_on_nodes(arm.model), predictors=predictors)


def _memory(config: EvaluateConfig, model: Checkpoint) -> int:
    shape = model.shape
    dtype: torch.dtype = torch.float32
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
    return model_memory(
        model,
        dtype,
        blocks=1 if config.ray_gpus else shape.n_layers,
        windows=1 if config.ray_gpus else config.batch_size,
        context=shape.context_length,
        head=True,
    )


def _named(item: _Item) -> str:
    return f"batch {item.number}"


def _answering(spread: list[Arm], device: str, dtype: str) -> Work[_Item, Any]:
    """Check the arms and return how a batch is answered; a model stays for the next arm of it."""
    arms = Arms(spread, device=device, dtype=dtype)
    opened: tuple[Arm, Backend, ArmFacts] | None = None

    def answer(item: _Item, tell: Tell) -> Any:
        nonlocal opened
        if opened is None or opened[0] != item.arm:
            opened = item.arm, *arms.open(item.arm)
        _, backend, facts = opened
        if item.batch:
            return _answered(backend, item)
        return _Known(
            facts=facts,
            kinds=tuple(backend.kinds),
            why_not=backend.why_not,
            max_length=backend.max_length,
        )

    return answer


def _answered(backend: Backend, item: _Item) -> Answered:
    backend.zeros()  # what a batch without answers left counted
    begun, batch = time.perf_counter(), item.batch
    asked: Any = batch
    try:
        made = (
            backend.score(asked)
            if item.decoding is None
            else backend.generate(asked, item.decoding)
        )
    except OutOfMemory as error:
        raise EngineError(
            f"{error.problem} for {len(batch)} requests", "pass a smaller --batch-size"
        ) from error
    seconds = time.perf_counter() - begun
    return Answered(made=list(made), zeros=backend.zeros(), seconds=seconds)
