"""The rank of each layer, chosen by predictors that are trained for a moment at several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

from common.element_types import ELEMENT_TYPES
from common.overlap import several_at_once
from predictor.module import to_half
from predictor.thresholds.choose import best_ranks
from predictor.thresholds.curves import Curves, mean_positive, trace_curves
from predictor.training.layer import LayerTrainer, train_layer
from predictor.training.settings import candidate_ranks
from predictor.training.start import Starter, start_sample

_SCOUT_ROWS = 32768
_CURVE_ROWS = 8192


def choose_ranks(trainer: LayerTrainer, layers: Sequence[int], weight: float) -> dict[int, int]:
    """Choose ranks that keep the run's bound in the fewest bytes, a predictor's weighted.

    A scout sees part of the training rows once; its curves are taken on rows that it did not see.
    How much better a larger rank is shows long before training ends, and only that decides.

    Args:
        trainer: traces, settings, rows, a bound.
        layers: layers to choose for, at one price for all.
        weight: what a predictor's byte costs relative to one of a neuron; see
            `cost_model.hardware.Hardware.predictor_weight`.

    Returns:
        Layer number to rank.
    """
    header, bound = trainer.store.header, trainer.bound
    assert bound is not None
    ranks = candidate_ranks(header.d_model)
    with tqdm(total=len(layers) * len(ranks), unit="scout", desc="ranks", disable=None) as bar:

        def work(layer: int, go_on: Callable[[], None]) -> dict[int, Curves]:
            return _scout(trainer, layer, ranks, go_on, bar)

        found = several_at_once(work, layers, trainer.jobs(len(layers)))
        # In the layers' order, whichever was ready first.
        curves = dict(sorted(found, key=lambda made: made[0]))
    cost = partial(
        ELEMENT_TYPES[trainer.config.predictor_type].relative,
        d_model=header.d_model,
        d_ff=header.d_ff,
        ffn_matrices=header.ffn_matrices,
    )
    enough = bound.leaves_room(len(layers) / header.n_layers)
    return best_ranks(curves, cost, header.d_ff, enough, weight)


def _scout(
    trainer: LayerTrainer,
    layer: int,
    ranks: Sequence[int],
    go_on: Callable[[], None],
    bar: tqdm,
) -> dict[int, Curves]:
    """Return the curves of a layer's scouts by rank."""
    recipe, rows, generator = trainer.recipe, trainer.rows(layer), trainer.generator(layer)
    scout = replace(recipe, epochs=min(1, recipe.epochs), best_recall=False)
    train = trainer.train
    order = train[torch.randperm(len(train), generator=generator)]
    seen, unseen, curves = order[:_SCOUT_ROWS], order[-_CURVE_ROWS:], {}
    starter = Starter(scout, rows, start_sample(scout, seen, generator))
    for rank in ranks:
        trained = train_layer(
            starter.at(rank, generator),
            rows,
            train=seen,
            holdout=unseen,
            generator=generator,
            dtype=trainer.dtype,
            on_step=lambda steps: go_on(),
        )
        predictor = to_half(trained)
        curves[rank] = trace_curves(predictor, rows, unseen, mean_positive(predictor, rows, unseen))
        bar.update()
    return curves
