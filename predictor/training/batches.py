"""Batches of trace rows with the weight that every label has in the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from common.overlap import made_ahead
from predictor.traces.rows import LabelledRows
from predictor.training.recipes import Recipe

_READ_ROWS = 4096


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


def read_batches(
    recipe: Recipe, rows: LabelledRows, device: torch.device, index: torch.Tensor
) -> list[Batch]:
    """Read the rows (n,) int64, cut them into batches and weigh their labels as the recipe says."""
    places, importance = rows.positives(index, importance=recipe.importance)
    power = importance.pow(recipe.importance_power)
    inputs, d_ff, batches = rows.inputs(index), rows.d_ff, []
    firsts = range(0, len(index), recipe.batch)
    cuts = torch.searchsorted(places, torch.tensor([*firsts, len(index)]) * d_ff).tolist()
    for first, low, high in zip(firsts, cuts[:-1], cuts[1:], strict=True):
        part = inputs[first : first + recipe.batch]
        positive = torch.ones(high - low)
        if recipe.importance:
            mean = power[low:high].mean() if high > low else positive.sum()
            positive = (power[low:high] / mean.clamp_min(1e-30)).clamp_max_(recipe.importance_cap)
        density = (high - low) / (len(part) * d_ff)
        batches.append(
            Batch(
                inputs=part.to(device),
                places=(places[low:high] - first * d_ff).to(device),
                positive=positive.to(device),
                negative=recipe.negative_weight * density + recipe.negative_floor,
            )
        )
    return batches


def batches(
    recipe: Recipe, rows: LabelledRows, device: torch.device, order: torch.Tensor
) -> Iterator[Batch]:
    """Yield the rows `order`, (n,) int64, in batches.

    Several are read together, which costs less than one by one; for a GPU the next ones are read
    while the last are in use.
    """
    read = partial(read_batches, recipe, rows, device)
    parts = torch.split(order, recipe.batch * max(1, _READ_ROWS // recipe.batch))
    through: Callable[..., Iterable[list[Batch]]] = map if device.type == "cpu" else made_ahead
    for together in through(read, parts):
        yield from together
