"""What training begins with: matrices, the coordinates they are in, and the recipe that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from predictor.module import Predictor
from predictor.traces.rows import LabelledRows
from predictor.training.batches import Batch, read_batches
from predictor.training.coordinates import Coordinates, whitening_of
from predictor.training.gradient import loss_of
from predictor.training.initialise import (
    constant_start,
    matching_biases,
    moments_of,
    pairs_start,
    random_start,
)
from predictor.training.recipes import Recipe

_MOMENT_ROWS = 32768
_START_ROWS = 8192
_SETTLE_ROWS = 512
_PART = 2048
_FACTORS = (1.0, 1.5, 2.0, 3.0)
_SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass(frozen=True)
class Start:
    """Where training begins.

    Attributes:
        recipe: as asked for, or with pairs where inputs have no constant direction, or the rank is
            exact anyway.
        predictor: float32, in the coordinates, on the device of training.
        coordinates: None for those of the inputs.
    """

    recipe: Recipe
    predictor: Predictor
    coordinates: Coordinates | None = None

    def plain(self) -> Predictor:
        """Return the predictor as it is now, of the inputs themselves, on the CPU."""
        if self.coordinates:
            return self.coordinates.plain(self.predictor).cpu()
        fc1, fc2 = (matrix.detach().cpu() for matrix in self.predictor.parameters())
        return Predictor(fc1.clone(), fc2.clone())


def begin(
    recipe: Recipe,
    rows: LabelledRows,
    rank: int,
    train: torch.Tensor,
    generator: torch.Generator,
    device: torch.device,
) -> Start:
    """Return the start that a recipe asks for.

    Args:
        recipe: settings.
        rows: the layer's trace rows.
        rank: hidden units.
        train: (n,) int64, rows to train on.
        generator: source of a random start and of the rows that others are made of.
        device: torch device to train on.
    """
    gate = rows.weights.gate
    if recipe.start == "random":
        return Start(recipe, random_start(rank, gate.shape[1], len(gate), generator).to(device))
    sample = train[torch.randperm(len(train), generator=generator)[:_MOMENT_ROWS]]
    moments = moments_of(rows.inputs(part).to(device) for part in torch.split(sample, _PART))
    gate = gate.to(device)
    whitening = None
    if recipe.start == "constant" and rank <= len(moments.mean) + 1:
        whitening = whitening_of(moments)
    if whitening is None:
        recipe = recipe.with_pairs()
        return Start(recipe, pairs_start(gate, moments, rank))
    seen = sample[:_START_ROWS]
    x = rows.inputs(seen).to(device)
    predictor, coordinates = constant_start(gate, whitening, rank, x)
    _settle(
        predictor,
        coordinates,
        x,
        rows.active(seen),
        read_batches(recipe, rows, device, seen[:_SETTLE_ROWS]),
    )
    return Start(recipe, predictor, coordinates)


@torch.no_grad()
def _settle(
    predictor: Predictor,
    coordinates: Coordinates,
    x: torch.Tensor,
    active: torch.Tensor,
    batches: Sequence[Batch],
) -> None:
    """Give a start the biases and the scale of logits that have the least loss.

    Biases let every neuron be predicted so many times as often as it is active, which also makes up
    for biases and thresholds that the gate does not show. The better the start is, the surer it may
    be.
    """

    def hidden(x: torch.Tensor) -> torch.Tensor:
        inputs = coordinates.inputs(x)
        return coordinates.hidden((inputs @ predictor.fc1.T).relu(), inputs)

    biases = matching_biases(hidden(x), predictor.fc2, active, _FACTORS)
    losses = torch.zeros(len(_FACTORS), len(_SCALES))
    for batch in batches:
        units = hidden(batch.inputs)
        for number, bias in enumerate(biases):
            predictor.fc2[:, -1] = bias
            logits = units @ predictor.fc2.T
            losses[number] += torch.tensor([loss_of(logits * scale, batch) for scale in _SCALES])
    factor, scale = divmod(int(losses.argmin()), len(_SCALES))
    predictor.fc2[:, -1] = biases[factor]
    predictor.fc2.mul_(_SCALES[scale])
