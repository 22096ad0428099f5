"""Training of a whole model's predictors, resumable after every layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace

from tqdm import tqdm

from architectures.model import check_device
from common.errors import PredictorError
from common.files import refuse_existing, remove_output
from predictor.artifact import PredictorArtifact, PredictorHeader
from predictor.calibration.calibrate import calibrate
from predictor.calibration.element_cost import ElementCost
from predictor.traces.store import TraceStore
from predictor.training.evaluation_text import held_out_model
from predictor.training.layer_result import LayerResult, LayerTraining
from predictor.training.parallel import each_layer
from predictor.training.ranks import choose_ranks
from predictor.training.recipes import DEJAVU, Recipe, published_rank, recipe_named
from predictor.training.requirements import (
    check_activity,
    check_importance,
    check_ranks,
    chosen_layers,
)
from predictor.training.settings import AUTO, TrainConfig


def train_predictors(
    config: TrainConfig, note: Callable[[str], None] = lambda line: None
) -> PredictorArtifact:
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
    check_device(config.device)
    store = TraceStore.open(config.traces)
    store.require_complete()
    recipe = _recipe_for(config)
    config = _settled(config, store)
    layers = chosen_layers(config, store)
    held = store.holdout(config.holdout, config.seed)
    check_ranks(config, store, recipe, int((~held).sum()))
    check_importance(config, store, recipe)
    check_activity(store, layers)
    training = LayerTraining(
        config=config,
        store=store,
        recipe=recipe,
        train=(~held).nonzero()[:, 0],
        holdout=held.nonzero()[:, 0],
    )
    artifact = _open_artifact(config, store, recipe)
    _set_ranks(training, artifact)
    _train_missing(training, artifact, layers)
    if config.bound is not None and artifact.complete:
        calibrate(
            artifact,
            config.bound,
            ElementCost(config.predictor_type),
            store.header.ffn_matrices,
            lambda: held_out_model(config, store, note),
        )
    return artifact


def _train_missing(training: LayerTraining, artifact: PredictorArtifact, layers: list[int]) -> None:
    """Train the layers that are not there yet and commit each as it is ready."""
    recipe, header = training.recipe, training.store.header
    steps = math.ceil(len(training.train) / recipe.batch) * recipe.epochs
    missing = [layer for layer in layers if layer not in artifact.layers]
    jobs = min(training.config.jobs_for(header.d_model, header.d_ff), max(len(missing), 1))
    expected = dict.fromkeys(missing, steps)
    with tqdm(total=len(layers) * steps, unit="step", desc="train-predictor", disable=None) as bar:
        bar.update((len(layers) - len(missing)) * steps)

        def work(layer: int, go_on: Callable[[], None]) -> LayerResult:
            def on_step(steps: int) -> None:
                go_on()
                bar.total += steps - expected[layer]
                expected[layer] = steps
                bar.update()

            return training(layer, artifact.rank(layer), on_step)

        for done, (layer, result) in enumerate(each_layer(work, missing, jobs), 1):
            if result.curves is not None:
                artifact.add_curves(layer, result.curves.tensors())
            artifact.add(layer, result.predictor, result.metrics)
            bar.set_postfix(layers=f"{len(layers) - len(missing) + done}/{len(layers)}")
        bar.update(bar.total - bar.n)  # a recipe may stop early


def _recipe_for(config: TrainConfig) -> Recipe:
    recipe = recipe_named(config.recipe)
    return recipe if ElementCost(config.predictor_type).fine else recipe.with_pairs()


def _settled(config: TrainConfig, store: TraceStore) -> TrainConfig:
    """Give the published recipe its published rank, a quarter of d_model, and threshold 0."""
    if config.recipe != DEJAVU.name or config.rank != AUTO:
        return config
    return replace(config, rank=published_rank(store.header.d_model))


def _set_ranks(training: LayerTraining, artifact: PredictorArtifact) -> None:
    """Settle the rank of every layer of the store that has none."""
    config, before = training.config, dict(artifact.ranks)
    if isinstance(config.rank, tuple):
        artifact.ranks = dict(enumerate(config.rank))
    recorded = training.store.header.layers
    missing = [layer for layer in recorded if layer not in artifact.ranks]
    if config.rank == AUTO and missing:
        artifact.ranks |= choose_ranks(training, missing)
    if artifact.ranks != before:
        artifact.write_header()


def _open_artifact(config: TrainConfig, store: TraceStore, recipe: Recipe) -> PredictorArtifact:
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
        own_thresholds=config.bound is not None,
        traces_identity=store.identity,
        recipe=asdict(recipe),
        holdout=config.holdout,
        label_top_fraction=config.label_top_fraction,
        seed=config.seed,
    )
    if config.resume and (config.out / "predictors.json").exists():
        artifact = PredictorArtifact.open(config.out)
        for key, value in vars(header).items():
            if key != "threshold" and getattr(artifact.header, key) != value:
                raise PredictorError(
                    f"{config.out}: was trained with another {key}",
                    "use the same settings and traces, or --force to start over",
                )
        return artifact
    refuse_existing(config.out, force=config.force, marker="predictors.json", resumable=True)
    remove_output(config.out)
    artifact = PredictorArtifact(config.out, header)
    artifact.write_header()
    return artifact
