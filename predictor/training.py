"""Training of a whole model's predictors, layer after layer, resumable."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from common.errors import PredictorError
from common.files import refuse_existing, remove_output
from predictor.artifact import LayerPredictor, PredictorArtifact, PredictorHeader
from predictor.importance import RANKING_BITS
from predictor.module import RANK_MULTIPLE, to_half
from predictor.recipes import Recipe, recipe_named
from predictor.rows import LabelledRows
from predictor.traces import TraceStore
from predictor.train import evaluate, train_layer


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `train-predictor`.

    Attributes:
        traces: store directory.
        out: artifact directory.
        rank: hidden units, a multiple of 32.
        recipe: `psp` or `dejavu`.
        holdout: share of rows held out, by document.
        label_top_fraction: train only on each token's largest activations, at most this fraction
            of neurons (0.15 is the published clipping); None trains on all.
        seed: seed of holdout, start and order.
        force: replace an existing artifact.
        resume: go on at the first missing layer.
    """

    traces: Path
    out: Path
    rank: int
    recipe: str = "psp"
    holdout: float = 0.1
    label_top_fraction: float | None = None
    seed: int = 0
    force: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that no model can have."""
        if self.rank < RANK_MULTIPLE or self.rank % RANK_MULTIPLE:
            raise PredictorError(
                f"rank {self.rank} cannot run in PowerInfer; "
                f"use a positive multiple of {RANK_MULTIPLE}"
            )
        recipe_named(self.recipe)


def train_predictors(config: TrainConfig) -> PredictorArtifact:
    """Train, measure on held-out documents and store a predictor for every recorded layer.

    Traces made in passes over the layers are trained one store after the other into one artifact,
    under `resume`.

    Raises:
        PspError: unusable traces, existing output, or an artifact made with other settings under
            `resume`.
    """
    store = TraceStore.open(config.traces)
    store.require_complete()
    recipe = recipe_named(config.recipe)
    if recipe.svd_start and config.rank // 2 > store.header.d_model:
        raise PredictorError(
            f"rank {config.rank} exceeds twice d_model ({2 * store.header.d_model}), which is "
            "exact already; lower --rank"
        )
    _check_importance(config, store, recipe)
    held = store.holdout(config.holdout, config.seed)
    artifact = _open_artifact(config, store, recipe)
    train, holdout = (~held).nonzero()[:, 0], held.nonzero()[:, 0]
    steps = math.ceil(len(train) / recipe.batch) * recipe.epochs
    layers = store.header.layers
    with tqdm(total=len(layers) * steps, unit="step", desc="train-predictor", disable=None) as bar:
        for number, layer in enumerate(layers):
            bar.set_postfix(layer=f"{number + 1}/{len(layers)}")
            if layer not in artifact.layers:
                _train_one(config, store, recipe, artifact, layer, train, holdout, bar)
            bar.update((number + 1) * steps - bar.n)
    return artifact


def _check_importance(config: TrainConfig, store: TraceStore, recipe: Recipe) -> None:
    bits = store.header.importance_bits
    if recipe.importance and not bits:
        raise PredictorError(
            f"{store.path}: holds no importance, by which recipe {recipe.name} weighs; collect "
            "with --importance-bits 2, or pass --recipe dejavu"
        )
    if config.label_top_fraction is not None and bits < RANKING_BITS:
        raise PredictorError(
            f"{store.path}: its importance of {bits} bits cannot rank neurons; collect with "
            f"--importance-bits {RANKING_BITS}, or leave out --label-top-fraction"
        )


def _train_one(
    config: TrainConfig,
    store: TraceStore,
    recipe: Recipe,
    artifact: PredictorArtifact,
    layer: int,
    train: torch.Tensor,
    holdout: torch.Tensor,
    bar: tqdm,
) -> None:
    header, share = store.header, config.label_top_fraction
    rows = LabelledRows(
        store.layer(layer),
        store.weights(layer),
        normalise=recipe.normalise,
        top=0 if share is None else max(1, int(share * header.d_ff)),
    )
    trained = train_layer(
        recipe,
        rows,
        rank=config.rank,
        train=train,
        holdout=holdout,
        generator=torch.Generator().manual_seed(config.seed * 1000 + layer),
        on_step=bar.update,
    )
    if not all(torch.isfinite(weight).all() for weight in trained.parameters()):
        raise PredictorError(
            f"layer {layer}: training diverged; check the traces of this layer, or try --recipe psp"
        )
    final = to_half(trained)
    metrics = evaluate(final, rows, holdout).metrics(
        rank=config.rank,
        d_model=header.d_model,
        d_ff=header.d_ff,
        ffn_matrices=header.ffn_matrices,
    )
    predictor = LayerPredictor(
        fc1=final.fc1.detach().half(),
        fc2=final.fc2.detach().half(),
        activation_counts=rows.rows.counts,
    )
    artifact.add(layer, predictor, metrics)


def _open_artifact(config: TrainConfig, store: TraceStore, recipe: Recipe) -> PredictorArtifact:
    header = PredictorHeader(
        model=store.header.model,
        model_fingerprint=store.header.model_fingerprint,
        architecture=store.header.architecture,
        activation=store.header.activation,
        n_layers=store.header.n_layers,
        d_model=store.header.d_model,
        d_ff=store.header.d_ff,
        rank=config.rank,
        threshold=0.0,
        traces_identity=store.identity,
        recipe=asdict(recipe),
        holdout=config.holdout,
        label_top_fraction=config.label_top_fraction,
        seed=config.seed,
    )
    if config.resume and (config.out / "predictors.json").exists():
        artifact = PredictorArtifact.open(config.out)
        for key, value in vars(header).items():
            if getattr(artifact.header, key) != value:
                raise PredictorError(
                    f"{config.out}: was trained with another {key}; use the same settings and "
                    "traces, or --force to start over"
                )
        return artifact
    refuse_existing(config.out, force=config.force, marker="predictors.json", resumable=True)
    remove_output(config.out)
    artifact = PredictorArtifact(config.out, header)
    artifact.write_header()
    return artifact
