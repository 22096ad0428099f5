"""Training of one layer's predictor."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from common.decisions import DecisionCounts
from predictor.module import Predictor, decide
from predictor.traces.rows import LabelledRows
from predictor.training.batches import batches
from predictor.training.gradient import set_gradients
from predictor.training.start import Start

_EVALUATION_ROWS = 2048
_TUNED_WIDTH = 512
_TUNED_RANK = 128
_WHITENED = 0.25
"""Of the rate, for fc1 where it takes whitened inputs."""


def train_layer(
    start: Start,
    rows: LabelledRows,
    *,
    train: torch.Tensor,
    holdout: torch.Tensor,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[int], object] = lambda steps: None,
) -> Predictor:
    """Train a predictor at threshold 0, where its start is.

    Args:
        start: with the recipe to train by; it is trained in place.
        rows: the layer's trace rows.
        train: (n,) int64, rows to train on.
        holdout: (m,) int64, rows that choose the epoch where the recipe asks for that.
        generator: source of the order of rows.
        dtype: type of matrix products; weights and optimiser are float32.
        on_step: called after every step with the number of steps in all.

    Returns:
        float32 predictor on the CPU; round it with `module.to_half` before it is measured.
    """
    recipe, predictor = start.recipe, start.predictor
    device = predictor.fc1.device
    rates = _rates(start)
    optimiser = torch.optim.AdamW(
        [{"params": [matrix], "lr": rate} for matrix, rate in rates],
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    steps = math.ceil(len(train) / recipe.batch) * recipe.epochs
    step, best, best_recall, bad = 0, start.plain(), -1.0, 0
    for _ in range(recipe.epochs):
        order = train[torch.randperm(len(train), generator=generator)]
        for batch in batches(recipe, rows, device, order):
            if recipe.cosine:
                for group, (_, rate) in zip(optimiser.param_groups, rates, strict=True):
                    group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            set_gradients(predictor, batch, dtype, start.coordinates)
            optimiser.step()
            step += 1
            on_step(steps)
        trained = start.plain()
        if not recipe.best_recall:
            best = trained
            continue
        counts = evaluate(trained, rows, holdout)
        recall = counts.hits / max(counts.active, 1)
        if recall > best_recall:
            best, best_recall, bad = trained, recall, 0
        else:
            bad += 1
        if recall >= recipe.stop_recall or bad >= recipe.patience:
            break
    return best


def _rates(start: Start) -> list[tuple[torch.nn.Parameter, float]]:
    recipe, predictor = start.recipe, start.predictor
    rank, d_model = predictor.fc2.shape[1], predictor.fc1.shape[1]
    if not recipe.scale_rate:
        return [(matrix, recipe.learning_rate) for matrix in (predictor.fc1, predictor.fc2)]
    share = _WHITENED if start.coordinates else 1.0
    return [
        (predictor.fc1, share * recipe.learning_rate * min(1.0, _TUNED_WIDTH / d_model)),
        (predictor.fc2, recipe.learning_rate * min(1.0, _TUNED_RANK / rank)),
    ]


def evaluate(predictor: Predictor, rows: LabelledRows, index: torch.Tensor) -> DecisionCounts:
    """Count decisions at threshold 0 against the uncut labels of the chosen rows."""
    counts, device = DecisionCounts(), predictor.fc1.device
    for part in torch.split(index, _EVALUATION_ROWS):
        predicted = decide(predictor, rows.inputs(part).to(device), 0.0)
        counts.add(rows.active(part), predicted.cpu())
    return counts
