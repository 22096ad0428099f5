"""Rank and type of each layer, chosen by predictors that are trained for a moment at several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from tqdm import tqdm

from common.element_types import ELEMENT_TYPES, F16, Q4_0
from predictor.dense_layer import least_size
from predictor.size import Size
from predictor.thresholds.curves import Curves, mean_positive, trace_curves
from predictor.thresholds.sizes import best_sizes
from predictor.training.layer import LayerTrainer, train_layer
from predictor.training.start import Starter, start_sample

SCOUT_ROWS = 8192
_CURVE_ROWS = 4096


Scouted = Callable[
    [Mapping[int, Sequence[Size]], tqdm], Iterator[tuple[int, Mapping[Size, Curves]]]
]
"""Lets layers be scouted for sizes, and yields each with its curves."""


def choose_sizes(
    trainer: LayerTrainer, sizes: Mapping[int, Sequence[Size]], weight: float, scouted: Scouted
) -> dict[int, Size]:
    """Choose sizes that keep the run's bound in the fewest bytes, a predictor's weighted.

    A scout sees part of the training rows once and is stored in every type; its curves are taken on
    rows that it did not see. How much better a larger rank is shows long before training ends, and
    only that decides.

    Args:
        trainer: traces, settings, rows, a bound.
        sizes: layer number to what its predictor may be; one price for all.
        weight: what a predictor's byte costs relative to one of a neuron; see
            `cost_model.hardware.Hardware.predictor_weight`.
        scouted: lets `scout` be called for every layer.

    Returns:
        Layer number to size.
    """
    header, bound = trainer.store.header, trainer.bound
    assert bound is not None
    scouts = sum(len({size.rank for size in each}) for each in sizes.values())
    with tqdm(total=scouts, unit="scout", desc="ranks", disable=None) as bar:
        # In the layers' order, whichever was ready first.
        curves = dict(sorted(scouted(sizes, bar), key=lambda made: made[0]))

    def cost(size: Size) -> float:
        return ELEMENT_TYPES[size.kind].relative(
            size.rank,
            d_model=header.d_model,
            d_ff=header.d_ff,
            ffn_matrices=header.ffn_matrices,
            ffn=ELEMENT_TYPES[trainer.outtype],
        )

    enough = bound.leaves_room(len(sizes) / header.n_layers)
    least = cost(least_size({size.kind for each in sizes.values() for size in each}))
    return best_sizes(curves, cost, header.d_ff, enough, weight, least)


def scout(
    trainer: LayerTrainer,
    layer: int,
    sizes: Sequence[Size],
    go_on: Callable[[], object] = lambda: None,
    on_scout: Callable[[], object] = lambda: None,
) -> dict[Size, Curves]:
    """Return the curves of a layer's scouts by size.

    Args:
        trainer: traces, settings, rows.
        layer: its number.
        sizes: to try.
        go_on: called after every step.
        on_scout: called after every rank.
    """
    recipe, rows, generator = trainer.recipe, trainer.rows(layer), trainer.generator(layer)
    short = replace(recipe, epochs=min(1, recipe.epochs), best_recall=False)
    train = trainer.train
    order = train[torch.randperm(len(train), generator=generator)]
    seen, unseen, curves = order[:SCOUT_ROWS], order[-_CURVE_ROWS:], {}
    starter = Starter(short, rows, start_sample(short, seen, generator))
    for rank in sorted({size.rank for size in sizes}):
        kinds = {size.kind for size in sizes if size.rank == rank}
        # A unit less in float16 is no matter for the choice.
        start = starter.at(Size(Q4_0 if Q4_0 in kinds else F16, rank), generator)
        trained = train_layer(
            start,
            rows,
            train=seen,
            holdout=unseen,
            generator=generator,
            dtype=trainer.dtype,
            on_step=lambda steps: go_on(),
        )
        for kind in sorted(kinds):
            predictor = starter.store(start, trained, kind).predictor()
            scale = mean_positive(predictor, rows, unseen)
            curves[Size(kind, rank)] = trace_curves(predictor, rows, unseen, scale)
        on_scout()
    return curves
