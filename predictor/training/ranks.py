"""The rank of each layer, chosen by predictors that are trained for a moment at several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

from predictor.calibration.element_cost import ElementCost
from predictor.calibration.operating_point import Curves, mean_positive, trace_curves
from predictor.calibration.search import best_ranks, candidate_ranks, within_bytes, within_gap
from predictor.module import to_half
from predictor.training.fit import train_layer
from predictor.training.layer_result import LayerTraining
from predictor.training.parallel import each_layer
from predictor.training.settings import RANK_MULTIPLE
from predictor.training.start import Starter

_SCOUT_ROWS = 32768
_CURVE_ROWS = 8192


def choose_ranks(training: LayerTraining, layers: Sequence[int]) -> dict[int, int]:
    """Choose ranks that keep the run's bound in the fewest bytes, a predictor's weighted.

    A scout sees part of the training rows once; its curves are taken on rows that it did not see.
    How much better a larger rank is shows long before training ends, and only that decides.

    Args:
        training: traces, settings, rows.
        layers: layers to choose for, at one price for all.

    Returns:
        Layer number to rank.
    """
    header, bound = training.store.header, training.config.bound
    assert bound is not None
    ranks = candidate_ranks(header.d_model, RANK_MULTIPLE)
    jobs = min(training.config.jobs_for(header.d_model, header.d_ff), len(layers))
    with tqdm(total=len(layers) * len(ranks), unit="scout", desc="ranks", disable=None) as bar:

        def work(layer: int, go_on: Callable[[], None]) -> dict[int, Curves]:
            return _scout(training, layer, ranks, go_on, bar)

        curves = dict(each_layer(work, layers, jobs))
    cost = partial(
        ElementCost(training.config.predictor_type).relative,
        d_model=header.d_model,
        d_ff=header.d_ff,
        ffn_matrices=header.ffn_matrices,
    )
    if bound.max_ppl_gap is None:
        assert bound.ffn_bytes is not None
        enough = within_bytes(bound.ffn_bytes)
    else:
        enough = within_gap(bound.max_ppl_gap * len(layers) / header.n_layers)
    return best_ranks(curves, cost, header.d_ff, enough, training.config.predictor_weight)


def _scout(
    training: LayerTraining,
    layer: int,
    ranks: Sequence[int],
    go_on: Callable[[], None],
    bar: tqdm,
) -> dict[int, Curves]:
    """Return the curves of a layer's scouts by rank."""
    config, recipe, rows = training.config, training.recipe, training.rows(layer)
    scout = replace(recipe, epochs=min(1, recipe.epochs), best_recall=False)
    generator = torch.Generator().manual_seed(config.seed * 1000 + layer)
    train = training.train
    order = train[torch.randperm(len(train), generator=generator)]
    seen, unseen, curves = order[:_SCOUT_ROWS], order[-_CURVE_ROWS:], {}
    starter = Starter(scout, rows, seen, generator, torch.device(config.device))
    for rank in ranks:
        trained = train_layer(
            starter.at(rank),
            rows,
            train=seen,
            holdout=unseen,
            generator=generator,
            dtype=config.dtype,
            on_step=lambda steps: go_on(),
        )
        predictor = to_half(trained)
        curves[rank] = trace_curves(predictor, rows, unseen, mean_positive(predictor, rows, unseen))
        bar.update()
    return curves
