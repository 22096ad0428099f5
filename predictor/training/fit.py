"""Training of one layer's predictor."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from common.decisions import DecisionCounts
from predictor.module import Predictor, decide
from predictor.traces.rows import LabelledRows
from predictor.training.initialise import random_start, second_moment, svd_start
from predictor.training.recipes import Recipe

_EVALUATION_ROWS = 2048
_MOMENT_ROWS = 32768
_TUNED_WIDTH = 512
_TUNED_RANK = 32


def train_layer(
    recipe: Recipe,
    rows: LabelledRows,
    *,
    rank: int,
    train: torch.Tensor,
    holdout: torch.Tensor,
    generator: torch.Generator,
    on_step: Callable[[], None] = lambda: None,
) -> Predictor:
    """Train a predictor at threshold 0.

    Args:
        recipe: settings.
        rows: the layer's trace rows.
        rank: hidden units.
        train: (n,) int64, rows to train on.
        holdout: (m,) int64, rows that choose the epoch where the recipe asks for that.
        generator: source of the start and of the order of rows.
        on_step: called after every step.

    Returns:
        float32 predictor; round it with `module.to_half` before it is measured.
    """
    predictor = _start(recipe, rows, rank, train, generator)
    rates = _rates(recipe, predictor)
    optimiser = torch.optim.AdamW(
        [{"params": [matrix], "lr": rate} for matrix, rate in rates],
        weight_decay=recipe.weight_decay,
    )
    steps = math.ceil(len(train) / recipe.batch) * recipe.epochs
    step, best, best_recall, bad = 0, predictor, -1.0, 0
    for _ in range(recipe.epochs):
        order = train[torch.randperm(len(train), generator=generator)]
        for index in torch.split(order, recipe.batch):
            if recipe.cosine:
                for group, (_, rate) in zip(optimiser.param_groups, rates, strict=True):
                    group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = _loss(recipe, predictor, rows, index)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            step += 1
            on_step()
        if not recipe.best_recall:
            best = predictor
            continue
        counts = evaluate(predictor, rows, holdout)
        recall = counts.hits / max(counts.active, 1)
        if recall > best_recall:
            best, best_recall, bad = copy.deepcopy(predictor), recall, 0
        else:
            bad += 1
        if recall >= recipe.stop_recall or bad >= recipe.patience:
            break
    return best


def _start(
    recipe: Recipe,
    rows: LabelledRows,
    rank: int,
    train: torch.Tensor,
    generator: torch.Generator,
) -> Predictor:
    d_ff, d_model = rows.weights.gate.shape
    if not recipe.svd_start:
        return random_start(rank, d_model, d_ff, generator)
    sample = train[torch.randperm(len(train), generator=generator)[:_MOMENT_ROWS]]
    return svd_start(rows.weights.gate, second_moment(rows.inputs(sample)), rank)


def _rates(recipe: Recipe, predictor: Predictor) -> list[tuple[torch.nn.Parameter, float]]:
    rank, d_model = predictor.fc1.shape
    if not recipe.scale_rate:
        return [(matrix, recipe.learning_rate) for matrix in (predictor.fc1, predictor.fc2)]
    return [
        (predictor.fc1, recipe.learning_rate * min(1.0, _TUNED_WIDTH / d_model)),
        (predictor.fc2, recipe.learning_rate * min(1.0, _TUNED_RANK / rank)),
    ]


def _loss(
    recipe: Recipe,
    predictor: Predictor,
    rows: LabelledRows,
    index: torch.Tensor,
) -> torch.Tensor:
    """Binary cross-entropy over neurons; see `Recipe` for the weights."""
    labels = rows.labels(index)
    density = labels.float().mean()
    negative = recipe.negative_weight * density + recipe.negative_floor
    positive = torch.ones(())
    if recipe.importance:
        importance = rows.importance(index)
        mean = importance.sum() / labels.sum().clamp_min(1)
        positive = (importance / mean.clamp_min(1e-30)).clamp_max(recipe.importance_cap)
    weight = torch.where(labels, positive, negative)
    logits = predictor(rows.inputs(index))
    return binary_cross_entropy_with_logits(logits, labels.float(), weight=weight)


def evaluate(predictor: Predictor, rows: LabelledRows, index: torch.Tensor) -> DecisionCounts:
    """Count decisions at threshold 0 against the uncut labels of the chosen rows."""
    counts = DecisionCounts()
    for part in torch.split(index, _EVALUATION_ROWS):
        counts.add(rows.active(part), decide(predictor, rows.inputs(part), 0.0))
    return counts
