"""The loss of training: rows in batches, the weight of every label, and the gradient, written out.

With z the logits, σ the logistic function and w the weight of a label, the loss is the mean over
all n·d_ff labels of w·log(1 + e^z) where a neuron is inactive and w·log(1 + e^-z) where it is
active, so its derivative by z is w·σ(z) and w·(σ(z) − 1) over n·d_ff. Active neurons are few: two
passes over all labels and a correction at some places replace those of automatic differentiation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import softplus

from predictor.module import Predictor
from predictor.traces.rows import LabelledRows
from predictor.training.coordinates import Coordinates
from predictor.training.settings import Recipe

READ_ROWS = 4096
"""Rows that are read together."""

_TOLD_ROWS = 16
"""Rows of a batch that its loss is told by: of all it would cost a third of a step."""

_SUREST = -30.0
"""Logit below which a neuron is sure to be inactive, 1e-13: what σ makes of less is soon subnormal,
and a processor multiplies such numbers many times slower."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows to take one step on.

    Attributes:
        inputs: (n, d_model) float32.
        places: (k,) int64, the positive labels' places in (n, d_ff), flattened.
        positive: (k,) float32, what each of them weighs.
        negative: what every other label weighs.
        told: how many of the places are in the first 16 rows, which the loss is told by.
    """

    inputs: torch.Tensor
    places: torch.Tensor
    positive: torch.Tensor
    negative: float
    told: int

    def first(self) -> Batch:
        """Return the first rows as a batch, their labels as they are weighed in this one."""
        return replace(
            self,
            inputs=self.inputs[:_TOLD_ROWS],
            places=self.places[: self.told],
            positive=self.positive[: self.told],
        )


def read_batches(recipe: Recipe, rows: LabelledRows, index: torch.Tensor) -> list[Batch]:
    """Read the rows (n,) int64, cut them into batches and weigh their labels as the recipe says."""
    places, importance = rows.positives(index, importance=recipe.importance)
    power = importance.pow(recipe.importance_power)
    inputs, d_ff, batches = rows.inputs(index), rows.d_ff, []
    firsts = range(0, len(index), recipe.batch)
    cuts, told = (
        rows.positives_within(index, places, ends)
        for ends in ([*firsts, len(index)], [first + _TOLD_ROWS for first in firsts])
    )
    for first, low, few, high in zip(firsts, cuts[:-1], told, cuts[1:], strict=True):
        part = inputs[first : first + recipe.batch]
        positive = torch.ones(high - low, device=places.device)
        if recipe.importance:
            mean = power[low:high].mean() if high > low else positive.sum()
            positive = (power[low:high] / mean.clamp_min(1e-30)).clamp_max_(recipe.importance_cap)
        density = (high - low) / (len(part) * d_ff)
        batches.append(
            Batch(
                inputs=part,
                places=places[low:high] - first * d_ff,
                positive=positive,
                negative=recipe.negative_weight * density + recipe.negative_floor,
                told=min(few, high) - low,
            )
        )
    return batches


def batches(
    recipe: Recipe, rows: LabelledRows, order: torch.Tensor, *, together: int = READ_ROWS
) -> Iterator[Batch]:
    """Yield the rows `order`, (n,) int64, in batches, where rows are computed with.

    Several are read together, which costs less than one by one.
    """
    for held, index in rows.parts(order, recipe.batch * max(1, together // recipe.batch)):
        yield from read_batches(recipe, held, index)


@torch.no_grad()
def set_gradients(
    predictor: Predictor, batch: Batch, dtype: torch.dtype, coordinates: Coordinates | None = None
) -> torch.Tensor:
    """Set the `grad` of both matrices.

    Args:
        predictor: float32, on the batch's device.
        batch: rows and labels.
        dtype: type of the matrix products; gradients are float32 whatever it is.
        coordinates: what the predictor is in, None for those of the inputs.

    Returns:
        The loss of the batch's first rows, 0-dimensional float32, on the device.
    """
    inputs = coordinates.inputs(batch.inputs) if coordinates else batch.inputs
    fc1, fc2, x = (t.to(dtype) for t in (predictor.fc1, predictor.fc2, inputs))
    before = x @ fc1.T
    hidden = before.relu()
    if coordinates:
        hidden = coordinates.hidden(hidden.float(), inputs).to(dtype)
    # σ(z) − 1 needs more digits than bfloat16 has where z is large.
    logits = (hidden @ fc2.T).float()
    loss = loss_of(logits[:_TOLD_ROWS], batch.first())
    slope = logits.clamp_min_(_SUREST).sigmoid_()
    flat, labels = slope.view(-1), slope.numel()
    positive = flat.index_select(0, batch.places).sub_(1).mul_(batch.positive / labels)
    slope.mul_(batch.negative / labels)
    flat.scatter_(0, batch.places, positive)
    slope = slope.to(dtype)
    predictor.fc2.grad = (slope.T @ hidden).float()
    # A product with all of fc2 takes less time than one with a copy of most of its columns.
    back = (slope @ fc2)[:, : len(fc1)]
    predictor.fc1.grad = (back.mul_(before > 0).T @ x).float()
    return loss


def loss_of(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the loss of logits (n, d_ff), 0-dimensional float32."""
    flat = logits.reshape(-1)
    found = flat.index_select(0, batch.places)
    positive = batch.positive * softplus(-found) - batch.negative * softplus(found)
    return batch.negative * softplus(flat).mean() + positive.sum() / len(flat)
