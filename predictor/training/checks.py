"""What a training refuses before its first step."""

from __future__ import annotations

from pathlib import Path

from common.element_types import ELEMENT_TYPES, F16
from common.errors import PredictorError
from predictor.traces.packing import RANKING_BITS
from predictor.traces.store import TraceStore
from predictor.training.bounds import bound_of
from predictor.training.layer import LayerTrainer
from predictor.training.settings import RECIPES, TrainConfig, possible_sizes


def check_ranks(
    config: TrainConfig, n_layers: int, d_model: int, rows: int, source: str | Path
) -> None:
    """Refuse ranks and types that the model or the rows cannot fill, and another number of ranks.

    Args:
        config: settings.
        n_layers: of the model.
        d_model: its hidden size.
        rows: to train on.
        source: where they come from, for errors.

    Raises:
        PredictorError: naming the option.
    """
    element = ELEMENT_TYPES.get(config.predictor_type)
    if element is not None and d_model % element.row_multiple:
        raise PredictorError(
            f"--predictor-type {config.predictor_type}: d_model {d_model} is no multiple of "
            f"{element.row_multiple}",
            "pass --predictor-type f16",
        )
    if isinstance(config.rank, tuple) and len(config.rank) != n_layers:
        raise PredictorError(
            f"--rank names {len(config.rank)} ranks, the model has {n_layers} layers",
            "pass one for each or a single one",
        )
    for rank in config.fixed_ranks:
        if RECIPES[config.recipe].start != "random" and rank // 2 > d_model:
            raise PredictorError(
                f"rank {rank} exceeds twice d_model ({2 * d_model}), which is exact already",
                "lower --rank",
            )
    sizes = possible_sizes(config, d_model, bounded=bound_of(config) is not None)
    largest = max(config.fixed_ranks or (size.rank for size in sizes))
    if rows < largest:
        raise PredictorError(
            f"{source}: {rows} rows to train on are too few for rank {largest}",
            "collect more --tokens, or pass a lower --rank",
        )


def check_outtype(trainer: LayerTrainer) -> None:
    """Refuse a type that a model of these sizes cannot have."""
    header, multiple = trainer.store.header, ELEMENT_TYPES[trainer.outtype].row_multiple
    for name in ("d_model", "d_ff") if trainer.outtype != F16 else ():
        if (size := getattr(header, name)) % multiple:
            raise PredictorError(
                f"--outtype {trainer.outtype}: {name} {size} is no multiple of {multiple}",
                "pass --outtype f16",
            )


def check_importance(trainer: LayerTrainer) -> None:
    """Refuse traces without the importance that is asked for, with the bits to collect."""
    store, recipe = trainer.store, trainer.recipe
    bits = store.header.importance_bits
    if recipe.importance and not bits:
        raise PredictorError(
            f"{store}: holds no importance, by which recipe {recipe.name} weighs",
            "collect with --importance-bits 2, or pass --recipe dejavu",
        )
    if trainer.config.label_top_fraction is not None and bits < RANKING_BITS:
        raise PredictorError(
            f"{store}: its importance of {bits} bits cannot rank neurons",
            f"collect with --importance-bits {RANKING_BITS}, or leave out --label-top-fraction",
        )
    if trainer.bound is not None and not bits:
        raise PredictorError(
            f"{store}: holds no importance, by which thresholds are chosen",
            "collect with --importance-bits 2, or leave out the bound",
        )


def check_activity(store: TraceStore, layers: list[int]) -> None:
    """Refuse layers in which nothing is ever computed, and a model in which everything always is.

    A layer of which every neuron is always active becomes a dense one.
    """
    sparsity = store.activation_sparsity()
    for layer in layers:
        if sparsity[layer] == 1:
            raise PredictorError(
                f"{store}: no neuron of layer {layer} was ever active, so its predictor has "
                "nothing to learn from",
                "collect from other text, or check the model's weights",
            )
    if len(sparsity) == store.header.n_layers and not any(sparsity.values()):
        raise PredictorError(
            f"{store}: every neuron of every layer was always active, so there is nothing to skip",
            "make the model sparse first (psp sparsify)",
        )
