"""The rank of each layer, chosen by predictors that are trained for a moment at several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

from predictor.calibration.calibrate import Bound
from predictor.calibration.element_cost import ElementCost
from predictor.calibration.operating_point import Curves, mean_positive, trace_curves
from predictor.calibration.search import best_ranks, candidate_ranks, within_bytes, within_gap
from predictor.module import RANK_MULTIPLE, to_half
from predictor.traces.rows import LabelledRows
from predictor.traces.store import TraceStore
from predictor.training.fit import train_layer
from predictor.training.recipes import Recipe

_SCOUT_ROWS = 32768
_CURVE_ROWS = 8192


def choose_ranks(
    store: TraceStore,
    recipe: Recipe,
    layers: Sequence[int],
    train: torch.Tensor,
    bound: Bound,
    element: ElementCost,
    seed: int,
) -> dict[int, int]:
    """Choose ranks that keep the bound in the fewest bytes.

    A scout sees part of the training rows once; its curves are taken on rows that it did not see.
    How much better a larger rank is shows long before training ends, and only that decides.

    Args:
        store: the traces.
        recipe: how predictors are trained.
        layers: layers to choose for, at one price for all.
        train: (n,) int64, training rows.
        bound: what will be kept to.
        element: type that predictors will be exported in.
        seed: seed of the run.

    Returns:
        Layer number to rank.
    """
    header = store.header
    scout = replace(recipe, epochs=min(1, recipe.epochs), best_recall=False)
    ranks = candidate_ranks(header.d_model, RANK_MULTIPLE)
    curves: dict[int, dict[int, Curves]] = {}
    with tqdm(total=len(layers) * len(ranks), unit="scout", desc="ranks", disable=None) as bar:
        for layer in layers:
            rows = LabelledRows(
                store.layer(layer), store.weights(layer), normalise=recipe.normalise
            )
            generator = torch.Generator().manual_seed(seed * 1000 + layer)
            order = train[torch.randperm(len(train), generator=generator)]
            seen, unseen = order[:_SCOUT_ROWS], order[-_CURVE_ROWS:]
            curves[layer] = {}
            for rank in ranks:
                trained = train_layer(
                    scout, rows, rank=rank, train=seen, holdout=unseen, generator=generator
                )
                predictor = to_half(trained)
                scale = mean_positive(predictor, rows, unseen)
                curves[layer][rank] = trace_curves(predictor, rows, unseen, scale)
                bar.update()
    cost = partial(
        element.relative,
        d_model=header.d_model,
        d_ff=header.d_ff,
        ffn_matrices=header.ffn_matrices,
    )
    gap = bound.max_ppl_gap
    if gap is None:
        assert bound.ffn_bytes is not None
        return best_ranks(curves, cost, header.d_ff, within_bytes(bound.ffn_bytes))
    share = len(layers) / header.n_layers
    return best_ranks(curves, cost, header.d_ff, within_gap(gap * share))
