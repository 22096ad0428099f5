"""What trains layers, from the settings of a run and its traces alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from architectures.checkpoint import Checkpoint
from architectures.rounded import own_type
from common.element_types import F16
from predictor.traces.store import TraceStore
from predictor.training.bounds import bound_of
from predictor.training.layer import LayerTrainer
from predictor.training.settings import AUTO, DEJAVU, RECIPES, TrainConfig, published_rank


def layer_trainer(
    config: TrainConfig, store: TraceStore, held: torch.Tensor | None = None
) -> LayerTrainer:
    """Return what trains layers by a run's settings.

    Args:
        config: settings.
        store: the traces.
        held: (rows,) bool, rows to hold out; None chooses documents.

    Raises:
        TraceError: documents are to be chosen and there is a single one.
    """
    recipe = RECIPES[config.recipe]
    if recipe.name == DEJAVU.name and config.rank == AUTO:
        config = replace(config, rank=published_rank(store.header.d_model, config.predictor_type))
    held = store.holdout(config.holdout, config.seed) if held is None else held
    return LayerTrainer(
        config=config,
        store=store,
        recipe=recipe,
        bound=bound_of(config),
        outtype=_outtype(config, store),
        train=(~held).nonzero()[:, 0],
        holdout=held.nonzero()[:, 0],
    )


def _outtype(config: TrainConfig, store: TraceStore) -> str:
    """Return the type that the model will be exported in."""
    if config.outtype is not None:
        return config.outtype
    model = config.model or store.header.model
    return own_type(Checkpoint.open(model)) if ".gguf" in model else F16
