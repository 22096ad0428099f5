"""Training of a whole model's predictors, layer after layer, resumable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from common.errors import PredictorError
from common.files import refuse_existing, remove_output
from predictor.artifact import LayerPredictor, PredictorArtifact, PredictorHeader
from predictor.calibration.calibrate import Bound, calibrate, measure_layer
from predictor.calibration.element_cost import ElementCost
from predictor.module import RANK_MULTIPLE, to_half
from predictor.traces.importance import RANKING_BITS
from predictor.traces.rows import LabelledRows
from predictor.traces.store import TraceStore
from predictor.training.evaluation_text import held_out_model
from predictor.training.fit import evaluate, train_layer
from predictor.training.ranks import choose_ranks
from predictor.training.recipes import DEJAVU, Recipe, recipe_named

AUTO = "auto"
DEFAULT_GAP = 0.001


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `train-predictor`.

    Attributes:
        traces: store directory.
        out: artifact directory.
        rank: hidden units of every layer, a multiple of 32; one for each; or `auto`, which chooses
            them.
        recipe: `psp`, `svd` or `dejavu`.
        max_ppl_gap: largest growth of perplexity that thresholds may cost, a fraction. With `auto`
            0.001 if no bound is given; else without a bound every threshold is 0.
        ffn_bytes: largest mean FFN bytes ratio, instead.
        predictor_type: element type that will be exported, which decides what a rank costs.
        model: checkpoint to measure the gap with; None takes the one that traces were made of.
        data: text to measure it on, in full; None takes the traces' own held-out documents.
        eval_tokens: tokens to measure it on, at most.
        device: torch device of that model.
        holdout: share of rows held out, by document.
        label_top_fraction: train only on each token's largest activations, at most this fraction
            of neurons (0.15 is the published clipping); None trains on all.
        seed: seed of holdout, start and order.
        force: replace an existing artifact.
        resume: go on at the first missing layer.
    """

    traces: Path
    out: Path
    rank: int | str | tuple[int, ...]
    recipe: str = "psp"
    max_ppl_gap: float | None = None
    ffn_bytes: float | None = None
    predictor_type: str = "f16"
    model: str | None = None
    data: str | None = None
    eval_tokens: int = 16384
    device: str = "cpu"
    holdout: float = 0.1
    label_top_fraction: float | None = None
    seed: int = 0
    force: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that no model can have."""
        for rank in self.fixed_ranks:
            if rank < RANK_MULTIPLE or rank % RANK_MULTIPLE:
                raise PredictorError(
                    f"rank {rank} cannot run in PowerInfer; "
                    f"use a positive multiple of {RANK_MULTIPLE}"
                )
        if isinstance(self.rank, str) and self.rank != AUTO:
            raise PredictorError(f"rank {self.rank!r}: pass a number, a list or {AUTO}")
        if self.max_ppl_gap is not None and self.ffn_bytes is not None:
            raise PredictorError("--max-ppl-gap and --ffn-bytes are two bounds; pass one of them")
        ElementCost(self.predictor_type)
        recipe_named(self.recipe)

    @property
    def fixed_ranks(self) -> tuple[int, ...]:
        """Ranks that were asked for: one for all layers, one for each, or none."""
        if isinstance(self.rank, str):
            return ()
        return (self.rank,) if isinstance(self.rank, int) else self.rank

    @property
    def bound(self) -> Bound | None:
        """What thresholds must keep to."""
        gap = self.max_ppl_gap
        if gap is None and self.ffn_bytes is None:
            if self.rank != AUTO:
                return None
            gap = DEFAULT_GAP
        return Bound(max_ppl_gap=gap, ffn_bytes=self.ffn_bytes)


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
    store = TraceStore.open(config.traces)
    store.require_complete()
    recipe = recipe_named(config.recipe)
    config = _settled(config, store)
    _check_ranks(config, store, recipe)
    _check_importance(config, store, recipe)
    held = store.holdout(config.holdout, config.seed)
    artifact = _open_artifact(config, store, recipe)
    train, holdout = (~held).nonzero()[:, 0], held.nonzero()[:, 0]
    _set_ranks(config, store, recipe, artifact, train)
    steps = math.ceil(len(train) / recipe.batch) * recipe.epochs
    layers = store.header.layers
    with tqdm(total=len(layers) * steps, unit="step", desc="train-predictor", disable=None) as bar:
        for number, layer in enumerate(layers):
            bar.set_postfix(layer=f"{number + 1}/{len(layers)}")
            if layer not in artifact.layers:
                _train_one(config, store, recipe, artifact, layer, train, holdout, bar)
            bar.update((number + 1) * steps - bar.n)
    if config.bound is not None and artifact.complete:
        calibrate(
            artifact,
            config.bound,
            ElementCost(config.predictor_type),
            store.header.ffn_matrices,
            lambda: held_out_model(config, store, note),
        )
    return artifact


def _settled(config: TrainConfig, store: TraceStore) -> TrainConfig:
    """Give the published recipe its published rank, a quarter of d_model, and threshold 0."""
    if config.recipe != DEJAVU.name or config.rank != AUTO:
        return config
    quarter = store.header.d_model // 4
    return replace(config, rank=max(RANK_MULTIPLE, quarter - quarter % RANK_MULTIPLE))


def _check_ranks(config: TrainConfig, store: TraceStore, recipe: Recipe) -> None:
    n_layers, d_model = store.header.n_layers, store.header.d_model
    if isinstance(config.rank, tuple) and len(config.rank) != n_layers:
        raise PredictorError(
            f"--rank names {len(config.rank)} ranks, the model has {n_layers} layers; pass one for "
            "each or a single one"
        )
    for rank in config.fixed_ranks:
        if recipe.svd_start and rank // 2 > d_model:
            raise PredictorError(
                f"rank {rank} exceeds twice d_model ({2 * d_model}), which is "
                "exact already; lower --rank"
            )


def _set_ranks(
    config: TrainConfig,
    store: TraceStore,
    recipe: Recipe,
    artifact: PredictorArtifact,
    train: torch.Tensor,
) -> None:
    """Settle the rank of every layer of the store that has none."""
    before = dict(artifact.ranks)
    if isinstance(config.rank, tuple):
        artifact.ranks = dict(enumerate(config.rank))
    if config.rank == AUTO and (
        missing := [n for n in store.header.layers if n not in artifact.ranks]
    ):
        assert config.bound is not None
        element = ElementCost(config.predictor_type)
        artifact.ranks |= choose_ranks(
            store, recipe, missing, train, config.bound, element, config.seed
        )
    if artifact.ranks != before:
        artifact.write_header()


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
        rank=artifact.rank(layer),
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
    element = ElementCost(config.predictor_type)
    metrics = evaluate(final, rows, holdout).metrics(
        rank=element.stored_rank(artifact.rank(layer)),
        d_model=header.d_model,
        d_ff=header.d_ff,
        ffn_matrices=header.ffn_matrices,
        predictor_width=element.width,
    )
    if config.bound is not None:
        generator = torch.Generator().manual_seed(config.seed * 1000 + layer)
        curves = measure_layer(final, rows, train, holdout, generator)
        artifact.add_curves(layer, curves.tensors())
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
                    f"{config.out}: was trained with another {key}; use the same settings and "
                    "traces, or --force to start over"
                )
        return artifact
    refuse_existing(config.out, force=config.force, marker="predictors.json", resumable=True)
    remove_output(config.out)
    artifact = PredictorArtifact(config.out, header)
    artifact.write_header()
    return artifact
