"""What traces must hold for the settings of a training run."""

from __future__ import annotations

from common.errors import PredictorError
from predictor.calibration.search import candidate_ranks
from predictor.traces.importance import RANKING_BITS
from predictor.traces.store import TraceStore
from predictor.training.recipes import Recipe
from predictor.training.settings import RANK_MULTIPLE, TrainConfig


def chosen_layers(config: TrainConfig, store: TraceStore) -> list[int]:
    """Return the layers to train.

    Raises:
        PredictorError: the traces lack one.
    """
    recorded = store.header.layers
    if config.layers is None:
        return recorded
    if unknown := [layer for layer in config.layers if layer not in recorded]:
        raise PredictorError(
            f"--layers: {store.path} has no layer {unknown[0]}",
            f"it holds {len(recorded)} layers from {recorded[0]} to {recorded[-1]}",
        )
    return list(config.layers)


def check_ranks(config: TrainConfig, store: TraceStore, recipe: Recipe, train: int) -> None:
    """Refuse ranks that the model or the rows cannot fill.

    Args:
        config: settings, with `auto` if ranks are chosen.
        store: the traces.
        recipe: settings of the recipe.
        train: rows to train on.

    Raises:
        PredictorError: another number of ranks than of layers, or a rank too large.
    """
    n_layers, d_model = store.header.n_layers, store.header.d_model
    if isinstance(config.rank, tuple) and len(config.rank) != n_layers:
        raise PredictorError(
            f"--rank names {len(config.rank)} ranks, the model has {n_layers} layers",
            "pass one for each or a single one",
        )
    for rank in config.fixed_ranks:
        if recipe.start != "random" and rank // 2 > d_model:
            raise PredictorError(
                f"rank {rank} exceeds twice d_model ({2 * d_model}), which is exact already",
                "lower --rank",
            )
    largest = max(config.fixed_ranks or candidate_ranks(d_model, RANK_MULTIPLE))
    if train < largest:
        raise PredictorError(
            f"{store.path}: {train} rows to train on are too few for rank {largest}",
            "collect more --tokens, or pass a lower --rank",
        )


def check_importance(config: TrainConfig, store: TraceStore, recipe: Recipe) -> None:
    """Refuse traces without the importance that is asked for.

    Raises:
        PredictorError: with the bits to collect.
    """
    bits = store.header.importance_bits
    if recipe.importance and not bits:
        raise PredictorError(
            f"{store.path}: holds no importance, by which recipe {recipe.name} weighs",
            "collect with --importance-bits 2, or pass --recipe dejavu",
        )
    if config.label_top_fraction is not None and bits < RANKING_BITS:
        raise PredictorError(
            f"{store.path}: its importance of {bits} bits cannot rank neurons",
            f"collect with --importance-bits {RANKING_BITS}, or leave out --label-top-fraction",
        )
    if config.bound is not None and not bits:
        raise PredictorError(
            f"{store.path}: holds no importance, by which thresholds are chosen",
            "collect with --importance-bits 2, or leave out the bound",
        )


def check_activity(store: TraceStore, layers: list[int]) -> None:
    """Refuse layers in which there is nothing to tell apart.

    Raises:
        PredictorError: no neuron was ever active, or each of them always.
    """
    sparsity = store.activation_sparsity()
    for layer in layers:
        if sparsity[layer] == 1:
            raise PredictorError(
                f"{store.path}: no neuron of layer {layer} was ever active, so its predictor has "
                "nothing to learn from",
                "collect from other text, or check the model's weights",
            )
        if sparsity[layer] == 0:
            raise PredictorError(
                f"{store.path}: every neuron of layer {layer} was always active, so there is "
                "nothing to skip",
                "make the model sparse first (psp sparsify)",
            )
