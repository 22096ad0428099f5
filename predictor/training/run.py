"""Training of a whole model's predictors, resumable after every layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from architectures.model import choose_device
from common.documents import look_at_documents
from common.errors import PredictorError
from common.files import refuse_existing, remove_output
from common.machine import bfloat16_note
from common.outputs import written_whole
from common.text_sources.names import need_repeatable
from cost_model.hardware import load_hardware
from predictor.artifact import INDEX, PredictorArtifact, PredictorHeader
from predictor.dense_layer import worth_line
from predictor.thresholds.choose import Measure, choose_thresholds, leave_out_unpaid
from predictor.traces.store import TraceStore
from predictor.training.checks import check_activity, check_importance, check_outtype, check_ranks
from predictor.training.held_out import held_out
from predictor.training.layer import LayerTrainer
from predictor.training.settings import TrainConfig, possible_sizes
from predictor.training.sizes import choose_sizes
from predictor.training.trainer import layer_trainer
from predictor.training.workers import Shown, Threads, Workers

Note = Callable[[str], None]


def train_predictors(config: TrainConfig, note: Note = lambda line: None) -> PredictorArtifact:
    """Train, measure on held-out documents and store a predictor for every recorded layer.

    Traces made in passes over the layers are trained one store after the other into one artifact,
    under `resume`. Thresholds are chosen once all layers are there, for all of them together.

    Args:
        config: settings.
        note: takes lines for the user.

    Raises:
        PspError: unusable traces, existing output, a bound out of reach, or an artifact made with
            other settings under `resume`.
    """
    weight = _predictor_weight(config, note)
    choose_device(config.device)
    go_on, replaces = config.resume, config.force
    with written_whole(
        config.out, resume=go_on, force=replaces, marker=INDEX, complete=_complete
    ) as out:
        artifact = _trained(replace(config, out=out), weight, note)
    return replace(artifact, path=config.out) if artifact.complete else artifact


def _complete(path: Path) -> bool:
    return PredictorArtifact.open(path).complete


def _trained(config: TrainConfig, weight: float, note: Note) -> PredictorArtifact:
    """Train into a directory that may be written, or go on with what is there."""
    store = TraceStore.open(config.traces)
    store.require_complete()
    layers = _chosen_layers(config, store)
    trainer = layer_trainer(config, store)
    if config.ray is None:
        store.require_scratch(trainer.jobs)
    sizes, rows = (store.header.n_layers, store.header.d_model), len(trainer.train)
    check_ranks(trainer.config, *sizes, rows, str(store))
    check_importance(trainer)
    check_activity(store, layers)
    if trainer.bound is not None and trainer.bound.ffn_bytes is None:
        _check_text(config, store, note)
    check_outtype(trainer)
    if trainer.dtype == torch.bfloat16 and (line := bfloat16_note(str(trainer.device))):
        note(line)
    with _workers(trainer, note) as workers:
        artifact = _open_artifact(trainer)
        _set_sizes(trainer, artifact, weight, workers)
        _train_missing(trainer, artifact, layers, workers)
        if artifact.complete:
            _choose(trainer, artifact, workers, note)
    return artifact


def _workers(trainer: LayerTrainer, note: Note) -> AbstractContextManager[Workers]:
    """Return who trains the layers."""
    if trainer.config.ray is None:
        return nullcontext(Threads(trainer))
    from predictor.training.nodes import nodes_for

    return nodes_for(trainer, note)


def _choose(
    trainer: LayerTrainer, artifact: PredictorArtifact, workers: Workers, note: Note
) -> None:
    """Choose thresholds where there is a bound, and the layers that are worth a predictor."""
    config, store = trainer.config, trainer.store
    matrices = store.header.ffn_matrices
    if trainer.bound is None:
        leave_out_unpaid(artifact, matrices)
    else:

        def open_measure() -> AbstractContextManager[Measure]:
            held = held_out(config, trainer.outtype, store, note)
            return workers.measuring(artifact, held)

        choose_thresholds(artifact, trainer.bound, matrices, open_measure)
    if artifact.dense:
        note(worth_line(artifact.ffn_bytes, artifact.dense))


def _predictor_weight(config: TrainConfig, note: Note) -> float:
    """Return what a predictor's byte costs relative to one of a neuron, where ranks are chosen."""
    if config.hardware is None:
        return 1.0
    hardware = load_hardware(config.hardware, torch.get_num_threads())
    weight = hardware.predictor_weight
    note(f"a predictor's byte costs {weight:.2g} of a neuron's on {config.hardware}")
    return weight


def _chosen_layers(config: TrainConfig, store: TraceStore) -> list[int]:
    """Return the layers to train; refuse one that the traces lack."""
    recorded = store.header.layers
    if config.layers is None:
        return list(recorded)
    if unknown := [layer for layer in config.layers if layer not in recorded]:
        raise PredictorError(
            f"--layers: {store} has no layer {unknown[0]}",
            f"it holds {len(recorded)} layers from {recorded[0]} to {recorded[-1]}",
        )
    return list(config.layers)


def _open_artifact(trainer: LayerTrainer) -> PredictorArtifact:
    config, store = trainer.config, trainer.store
    header = PredictorHeader(
        model=store.header.model,
        model_fingerprint=store.header.model_fingerprint,
        architecture=store.header.architecture,
        activation=store.header.activation,
        n_layers=store.header.n_layers,
        d_model=store.header.d_model,
        d_ff=store.header.d_ff,
        rank=config.rank if isinstance(config.rank, int) else str(config.rank),
        threshold=0.0,
        own_thresholds=trainer.bound is not None,
        predictor_type=config.predictor_type,
        outtype=trainer.outtype,
        traces_identity=store.identity,
        recipe=asdict(trainer.recipe),
        holdout=config.holdout,
        label_top_fraction=config.label_top_fraction,
        seed=config.seed,
    )
    if config.resume and (config.out / INDEX).exists():
        artifact = PredictorArtifact.open(config.out)
        chosen_again = ("threshold", "outtype") if trainer.bound is not None else ("threshold",)
        for key, value in vars(header).items():
            if key not in chosen_again and getattr(artifact.header, key) != value:
                raise PredictorError(
                    f"{config.out}: was trained with another {key}",
                    "use the same settings and traces, or --force to start over",
                )
        artifact.header = replace(artifact.header, outtype=header.outtype)
        artifact.tokens = store.rows
        return artifact
    refuse_existing(config.out, force=config.force, marker=INDEX, resumable=True)
    remove_output(config.out)
    files = store.progress.model_files
    artifact = PredictorArtifact(config.out, header, model_files=files, tokens=store.rows)
    artifact.write_header()
    return artifact


def _set_sizes(
    trainer: LayerTrainer, artifact: PredictorArtifact, weight: float, workers: Workers
) -> None:
    """Settle the rank and the type of every layer of the store that has none."""
    bounded, d_model = trainer.bound is not None, trainer.store.header.d_model
    missing = [layer for layer in trainer.store.header.layers if layer not in artifact.types]
    sizes = {n: possible_sizes(trainer.config, d_model, n, bounded=bounded) for n in missing}
    chosen = {n: each[0] for n, each in sizes.items() if len(each) == 1}
    if open_ := {n: each for n, each in sizes.items() if n not in chosen}:
        chosen |= choose_sizes(trainer, open_, weight, workers.scouted)
    for layer, size in chosen.items():
        artifact.ranks[layer], artifact.types[layer] = size.rank, size.kind
    if chosen:
        artifact.write_header()


def _train_missing(
    trainer: LayerTrainer, artifact: PredictorArtifact, layers: list[int], workers: Workers
) -> None:
    """Train the layers that are not there yet and commit each as it is ready."""
    recipe = trainer.recipe
    steps = math.ceil(len(trainer.train) / recipe.batch) * recipe.epochs
    missing = [layer for layer in layers if layer not in artifact.layers]
    with tqdm(total=len(layers) * steps, unit="step", desc="train-predictor", disable=None) as bar:
        bar.update((len(layers) - len(missing)) * steps)
        shown = Shown(bar, dict.fromkeys(missing, steps), len(layers))
        sizes = {layer: artifact.trained_size(layer) for layer in missing}
        for layer, commit in workers.trained(sizes, shown):
            commit(artifact)
            shown.finished(layer)
        bar.update(bar.total - bar.n)  # a recipe may stop early


def _check_text(config: TrainConfig, store: TraceStore, note: Note) -> None:
    """Refuse before hours of training what a gap could not be measured on after them."""
    header = store.header
    if config.data:
        field, template = header.field, header.chat_template
        look_at_documents(config.data, field, template, config.eval_tokens, note)
    else:
        need_repeatable(header.data, f"the held-out part of {store}", "pass --data")
