"""Layers on a Ray cluster: workers train them and write files, which this process commits.

A worker knows the run by its settings and opens the traces itself, so that nothing large passes
between machines. Its bytes are those of a layer in this process with as many threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from architectures.model_files import weight_files
from cluster.nodes import Worker
from cluster.pool import Pool
from cluster.session import cluster_for, parts_beside, path_on_nodes
from cluster.settings import worker_device
from cluster.watch import Watch
from cluster.worker import Tell, Work
from common.errors import COLLECT_AGAIN, TRAIN_AGAIN, PredictorError, TraceError
from predictor.artifact import Epoch, PredictorArtifact
from predictor.size import Size
from predictor.tensor_files import StoredTensors, load_tensors
from predictor.thresholds.choose import Measure
from predictor.thresholds.curves import Curves
from predictor.traces.manifest import MANIFEST
from predictor.traces.store import TraceStore
from predictor.training.held_out import HeldOut
from predictor.training.layer import LayerTrainer
from predictor.training.measuring import measuring_on_nodes
from predictor.training.memory import layer_memory
from predictor.training.settings import TrainConfig
from predictor.training.sizes import scout
from predictor.training.trainer import layer_trainer
from predictor.training.workers import Commit, Shown, Workers

_CURVES = ("thresholds", "computed", "hits", "missed")


_Item = tuple[int, Size | tuple[Size, ...]]
"""A layer, with the size to train it in or those to scout."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a worker knows of the run.

    Attributes:
        config: the run's settings, for a node: paths are absolute, types and device settled.
        identity: of the traces.
        parts: directory of all workers' files.
    """

    config: TrainConfig
    identity: str
    parts: Path

    def file(self, name: str) -> Path:
        """Return a file that no other worker writes, nor this one when it tries again."""
        return self.parts / f"{name}-{uuid4().hex}.safetensors"


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """A layer that a worker has trained and stored.

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

    def __init__(
        self,
        run: _Run,
        worker: Worker,
        pool: Pool[_Item, Any],
        note: Callable[[str], None],
    ) -> None:
        """Take what workers do.

        Args:
            run: what they know of it.
            worker: what each takes of a node.
            pool: of them.
            note: takes lines for the user.
        """
        self._run, self._worker, self._pool, self._note = run, worker, pool, note

    def scouted(
        self, sizes: Mapping[int, Sequence[Size]], bar: tqdm
    ) -> Iterator[tuple[int, Mapping[Size, Curves]]]:
        """Yield every layer with the curves of its scouts."""
        items = [(layer, tuple(each)) for layer, each in sizes.items()]
        for (layer, _), stored in self._pool.made(items, self._watch(bar)):
            bar.update(len({size.rank for size in stored}))
            yield layer, {size: _read_curves(stored[size]) for size in stored}

    def trained(self, sizes: Mapping[int, Size], shown: Shown) -> Iterator[tuple[int, Commit]]:
        """Yield every layer with what commits it."""
        for (layer, _), made in self._pool.made(sizes.items(), self._watch(shown.bar)):
            shown.whole(layer, made.epochs)
            yield layer, partial(made.commit, layer)

    def measuring(
        self, artifact: PredictorArtifact, held: HeldOut
    ) -> AbstractContextManager[Measure]:
        """See `predictor.training.workers.Workers`."""
        config = self._run.config
        self._pool.close()  # the model wants its room
        return measuring_on_nodes(
            artifact,
            replace(held, model=path_on_nodes(held.model)),
            asked=self._worker,
            device=config.device,
            parts=self._run.parts,
            note=self._note,
            verbose=config.verbose,
        )

    def _watch(self, bar: tqdm) -> Watch:
        verbose = self._run.config.verbose
        return Watch(bar, self._note, what="layers", named=_named, verbose=verbose)


@contextmanager
def nodes_for(trainer: LayerTrainer, note: Callable[[str], None]) -> Iterator[Workers]:
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
    device, manifest = worker_device(config.device, config.ray_gpus), store.place.at(MANIFEST)
    # Who does not see an object store is told of when its worker opens the traces.
    read = [manifest] if isinstance(manifest, Path) else []
    if trainer.bound is not None and trainer.bound.ffn_bytes is None:
        read += weight_files(Checkpoint.open(config.model or store.header.model))
    with (
        parts_beside(config.out) as parts,
        cluster_for(config.ray, worker, read=read, write=parts, note=note),
    ):
        known = replace(
            config,
            traces=store.place.absolute(),
            outtype=trainer.outtype,
            device=device,
            ray=None,
        )
        run = _Run(config=known, identity=store.identity, parts=parts)
        pool: Pool[_Item, Any]
        with Pool(partial(_training, run), worker, most=len(store.header.layers)) as pool:
            yield Nodes(run, worker, pool, note)


def _named(item: tuple[int, object]) -> str:
    return f"layer {item[0]}"


def _trainer(run: _Run) -> LayerTrainer:
    """Return what trains layers in a worker.

    Raises:
        TraceError: the traces are not those that the run began with.
    """
    store = TraceStore.open(run.config.traces)
    if store.identity != run.identity:
        raise TraceError(f"{store}: was replaced while it was read", COLLECT_AGAIN)
    store.require_scratch(1)
    return layer_trainer(run.config, store)


def _training(run: _Run) -> Work[_Item, Any]:
    """Open the traces and return how a layer is scouted for sizes, or trained, and stored."""
    trainer = _trainer(run)

    def make(item: _Item, tell: Tell) -> Any:
        layer, size = item
        if isinstance(size, Size):
            return _trained(run, trainer, layer, size, tell)
        found = scout(trainer, layer, size, on_scout=lambda: tell(1))
        return {
            each: StoredTensors.save(run.file(f"scout-{layer}"), _curve_tensors(curves))
            for each, curves in found.items()
        }

    return make


def _trained(run: _Run, trainer: LayerTrainer, layer: int, size: Size, tell: Tell) -> _Trained:
    """Train and store a layer."""
    result = trainer.run(layer, size, lambda steps: tell(1), lambda epochs: None)
    curves = None
    if result.curves is not None:
        curves = StoredTensors.save(run.file(f"curves-{layer}"), result.curves.tensors())
    return _Trained(
        predictor=StoredTensors.save(run.file(f"layer-{layer}"), vars(result.predictor)),
        curves=curves,
        metrics=result.metrics,
        epochs=tuple(result.epochs),
    )


def _curve_tensors(curves: Curves) -> dict[str, torch.Tensor]:
    tensors = {name: getattr(curves, name) for name in _CURVES}
    return tensors | {"rows": torch.tensor(curves.rows)}


def _read_curves(stored: StoredTensors) -> Curves:
    tensors = load_tensors(stored.file, stored.digest, PredictorError, TRAIN_AGAIN)
    return Curves(**{n: tensors[n] for n in _CURVES}, rows=int(tensors["rows"]))
