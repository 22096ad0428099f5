"""Trace rows of a layer whose structure is known."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from predictor.collection.recorder import row_importance
from predictor.module import Predictor
from predictor.size import Size
from predictor.traces.packing import active_places, pack_active, pack_codes
from predictor.traces.rows import LabelledRows, LayerRows, LayerWeights, ShardedRows
from predictor.training.coordinates import Moments
from predictor.training.settings import PSP, Recipe
from predictor.training.start import (
    Start,
    Starter,
    leading,
    pairs_start,
    scaled_gate,
    start_sample,
)

D_MODEL, D_FF = 64, 96
TRAIN, HOLDOUT = torch.arange(2400), torch.arange(2400, 3000)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def rows_from(
    active: torch.Tensor, importance: torch.Tensor, inputs: torch.Tensor, bits: int = 8
) -> ShardedRows:
    """Store rows as a collection does."""
    packed, per_row = pack_active(active), active.sum(1)
    row, _ = active_places(packed)
    scale, codes = row_importance(importance[active], row, len(active), bits)
    piece = LayerRows(
        inputs=inputs.half(),
        active=packed,
        counts=active.sum(0),
        importance_bits=bits,
        scale=scale,
        starts=torch.cumsum(per_row, 0) - per_row,
        importance=torch.from_numpy(pack_codes(codes.numpy(), bits)),
        file=Path("traces"),
    )
    return ShardedRows(piece)


def planted_layer(mean: float) -> tuple[ShardedRows, LayerWeights]:
    """Return a layer whose gate has rank 8 beneath noise and is closed on the average input.

    Args:
        mean: length of the average input, in standard deviations of the rest along any direction.
    """
    average = normal(D_MODEL, seed=1)
    average = average / average.norm()
    gate = normal(D_FF, 8, seed=2) @ normal(8, D_MODEL, seed=3) / 8**0.5
    gate = gate + normal(D_FF, D_MODEL, seed=4)
    gate = gate - torch.outer(gate @ average + 1.2 * D_MODEL**0.5 / mean, average)
    inputs = (normal(3000, D_MODEL, seed=5) + mean * average).half()
    opened = inputs.float() @ gate.T
    norms = torch.rand(D_FF, generator=seeded(7)) + 0.5
    importance = (opened * normal(3000, D_FF, seed=6)).abs() * norms
    return rows_from(opened > 0, importance, inputs), LayerWeights(gate, norms)


def pairs(gate: torch.Tensor, moments: Moments, rank: int) -> Predictor:
    """Return the start of a gate in pairs of units."""
    directions = leading(scaled_gate(gate, moments.factor), rank // 2)
    return pairs_start(directions, moments.factor, rank)


def labels_of(rows: LabelledRows, index: torch.Tensor) -> torch.Tensor:
    """Return (n, d_ff) bool labels to train on."""
    labels = torch.zeros(len(index), rows.d_ff, dtype=torch.bool)
    labels.view(-1)[rows.positives(index, importance=False)[0]] = True
    return labels


def starting_at(
    recipe: Recipe, rows: LabelledRows, train: torch.Tensor, generator: torch.Generator
) -> Start:
    """Return the start of rank 32 as a training makes it."""
    sample = start_sample(recipe, train, generator)
    return Starter(recipe, rows, sample).at(Size("f16", 32), generator)


def importance_loss(predictor: Predictor, rows: LabelledRows) -> float:
    """Return the held-out loss of the psp recipe at the best scale of the logits."""
    active = rows.active(HOLDOUT)
    power = rows.importance(HOLDOUT) ** PSP.importance_power
    positive = (power * active.sum() / power.sum()).clamp_max(PSP.importance_cap)
    negative = PSP.negative_weight * active.float().mean() + PSP.negative_floor
    weight = torch.where(active, positive, negative)
    with torch.no_grad():
        logits = predictor(rows.inputs(HOLDOUT))
    losses = [
        binary_cross_entropy_with_logits(logits * 2.0**power, active.float(), weight=weight)
        for power in range(-8, 8)
    ]
    return float(min(losses))
