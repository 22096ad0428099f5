"""Batches of trace rows with the weight that every label has in the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from common.overlap import made_ahead
from predictor.traces.rows import LabelledRows
from predictor.training.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows to take one step on.

    Attributes:
        inputs: (n, d_model) float32.
        places: (k,) int64, the positive labels' places in (n, d_ff), flattened.
        positive: (k,) float32, what each of them weighs.
        negative: what every other label weighs.
    """

    inputs: torch.Tensor
    places: torch.Tensor
    positive: torch.Tensor
    negative: float


def make_batch(
    recipe: Recipe, rows: LabelledRows, device: torch.device, index: torch.Tensor
) -> Batch:
    """Read the rows (n,) int64 and weigh their labels as the recipe says."""
    places, importance = rows.positives(index, importance=recipe.importance)
    density = len(places) / max(len(index) * rows.d_ff, 1)
    positive = torch.ones(len(places))
    if recipe.importance:
        power = importance.pow(recipe.importance_power)
        mean = power.sum() / max(len(power), 1)
        positive = (power / mean.clamp_min(1e-30)).clamp_max_(recipe.importance_cap)
    return Batch(
        inputs=rows.inputs(index).to(device),
        places=places.to(device),
        positive=positive.to(device),
        negative=recipe.negative_weight * density + recipe.negative_floor,
    )


def batches(
    recipe: Recipe, rows: LabelledRows, device: torch.device, order: torch.Tensor
) -> Iterator[Batch]:
    """Yield the rows `order`, (n,) int64, in batches; for a GPU they are made ahead."""
    make = partial(make_batch, recipe, rows, device)
    through: Callable[..., Iterable[Batch]] = map if device.type == "cpu" else made_ahead
    yield from through(make, torch.split(order, recipe.batch))
