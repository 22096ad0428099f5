"""Layers on a Ray cluster: each is a task, whose results are files that this process commits.

A task knows the run by its settings and opens the traces itself, so that nothing large passes
between machines. Its bytes are those of a layer in this process with as many threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from uuid import uuid4

import torch
from tqdm import tqdm

from cluster.connection import reached
from cluster.nodes import Worker, alive_nodes, require_alike, require_room
from cluster.tasks import several_on_nodes
from common.errors import COLLECT_AGAIN, TRAIN_AGAIN, PredictorError, TraceError
from common.files import write_error
from common.scratch import Scratch
from predictor.artifact import Epoch, PredictorArtifact
from predictor.size import Size
from predictor.tensor_files import StoredTensors, load_tensors
from predictor.thresholds.curves import Curves
from predictor.traces.manifest import MANIFEST
from predictor.traces.store import TraceStore
from predictor.training.layer import LayerTrainer
from predictor.training.memory import layer_memory
from predictor.training.settings import TrainConfig
from predictor.training.sizes import scout
from predictor.training.trainer import layer_trainer
from predictor.training.workers import Commit, Shown

_CURVES = ("thresholds", "computed", "hits", "missed")


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a task knows of the run.

    Attributes:
        config: the run's settings, for a node: paths are absolute, types and device settled.
        identity: of the traces.
        parts: directory of all tasks' files.
    """

    config: TrainConfig
    identity: str
    parts: Path

    def file(self, name: str) -> Path:
        """Return a file that no other task writes, nor this one when it is tried again."""
        return self.parts / f"{name}-{uuid4().hex}.safetensors"


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """A layer that a task has trained and stored.

    Attributes:
        predictor: its predictor.
        curves: what other thresholds lead to, where some will be chosen.
        metrics: see `LayerResult`.
        epochs: likewise.
    """

    predictor: StoredTensors
    curves: StoredTensors | None
    metrics: dict[str, float]
    epochs: tuple[Epoch, ...]

    def commit(self, layer: int, artifact: PredictorArtifact) -> None:
        """Put it into the artifact."""
        artifact.adopt(layer, self.predictor, self.curves, self.metrics, self.epochs)


class Nodes:
    """Layers on the nodes of a cluster; see `predictor.training.workers.Workers`."""

    def __init__(self, run: _Run, worker: Worker) -> None:
        """Name the run, and what a task takes of a node."""
        self._run, self._worker = run, worker

    def scouted(
        self, sizes: Mapping[int, Sequence[Size]], bar: tqdm
    ) -> Iterator[tuple[int, Mapping[Size, Curves]]]:
        """Yield every layer with the curves of its scouts."""
        items = [(layer, tuple(each)) for layer, each in sizes.items()]
        work = partial(_scout_layer, self._run)
        for (layer, each), stored in several_on_nodes(work, items, self._worker):
            bar.update(len({size.rank for size in each}))
            yield layer, {size: _read_curves(stored[size]) for size in stored}

    def trained(self, sizes: Mapping[int, Size], shown: Shown) -> Iterator[tuple[int, Commit]]:
        """Yield every layer with what commits it; steps are told by whole layers."""
        work = partial(_train_layer, self._run)
        for (layer, _), made in several_on_nodes(work, sizes.items(), self._worker):
            shown.whole(layer, made.epochs)
            yield layer, partial(made.commit, layer)


@contextmanager
def nodes_for(trainer: LayerTrainer, note: Callable[[str], None]) -> Iterator[Nodes]:
    """Start or reach the cluster of a run, and make sure that it can do the work.

    Args:
        trainer: of the run, as it would train in this process.
        note: takes a line for the user.

    Raises:
        ClusterError: there is no cluster, or its nodes lack room, versions or files.
    """
    config, store = trainer.config, trainer.store
    assert config.ray is not None
    worker = Worker(
        cpus=config.ray_cpus,
        gpus=config.ray_gpus,
        memory=layer_memory(store.header, store.rows),
    )
    device = _device(config)
    with reached(config.ray), _parts(config.out) as parts:
        require_room(worker)
        require_alike([store.path / MANIFEST], parts)
        note(f"training on {_told(len(alive_nodes()))}, {config.ray_cpus} CPUs a layer")
        known = replace(
            config,
            traces=store.path.absolute(),
            outtype=trainer.outtype,
            device=device,
            ray=None,
        )
        yield Nodes(_Run(config=known, identity=store.identity, parts=parts), worker)


def _told(nodes: int) -> str:
    return "1 node" if nodes == 1 else f"{nodes} nodes"


def _device(config: TrainConfig) -> str:
    """Return where tasks compute."""
    if config.ray_gpus:
        return "cuda" if config.device == "auto" else config.device
    if config.device not in ("auto", "cpu"):
        raise PredictorError(
            f"--device {config.device}: tasks on the cluster have no GPU", "pass --ray-gpus 1"
        )
    return "cpu"


@contextmanager
def _parts(out: Path) -> Iterator[Path]:
    """Make the directory of tasks' files, on the disk of the artifact."""
    target = out.resolve()
    try:
        scratch = Scratch(target.parent, f".{target.name}.parts-")
    except OSError as error:
        raise write_error(out, error) from error
    with scratch as path:
        yield path


@cache
def _trainer(run: _Run) -> LayerTrainer:
    """Return what trains layers in this task's process.

    Raises:
        TraceError: the traces are not those that the run began with.
    """
    store = TraceStore.open(run.config.traces)
    if store.identity != run.identity:
        raise TraceError(f"{store.path}: was replaced while it was read", COLLECT_AGAIN)
    return layer_trainer(run.config, store)


def _train_layer(run: _Run, item: tuple[int, Size]) -> _Trained:
    """Train and store a layer: the task."""
    layer, size = item
    result = _trainer(run).run(layer, size, lambda steps: None, lambda epochs: None)
    curves = None
    if result.curves is not None:
        curves = StoredTensors.save(run.file(f"curves-{layer}"), result.curves.tensors())
    return _Trained(
        predictor=StoredTensors.save(run.file(f"layer-{layer}"), vars(result.predictor)),
        curves=curves,
        metrics=result.metrics,
        epochs=tuple(result.epochs),
    )


def _scout_layer(run: _Run, item: tuple[int, tuple[Size, ...]]) -> dict[Size, StoredTensors]:
    """Scout a layer for sizes and store their curves: the task."""
    layer, sizes = item
    found = scout(_trainer(run), layer, sizes)
    return {
        size: StoredTensors.save(run.file(f"scout-{layer}"), _curve_tensors(curves))
        for size, curves in found.items()
    }


def _curve_tensors(curves: Curves) -> dict[str, torch.Tensor]:
    tensors = {name: getattr(curves, name) for name in _CURVES}
    return tensors | {"rows": torch.tensor(curves.rows)}


def _read_curves(stored: StoredTensors) -> Curves:
    tensors = load_tensors(stored.file, stored.digest, PredictorError, TRAIN_AGAIN)
    return Curves(**{n: tensors[n] for n in _CURVES}, rows=int(tensors["rows"]))
