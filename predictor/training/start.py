"""What training begins with: matrices, the coordinates they are in, and the recipe that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from predictor.module import Predictor
from predictor.traces.rows import LabelledRows
from predictor.training.batches import Batch, read_batches
from predictor.training.coordinates import Coordinates, Moments, whitening_of
from predictor.training.gradient import loss_of
from predictor.training.initialise import (
    Directions,
    constant_start,
    directions_of,
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


class Starter:
    """Makes the starts of a layer, of any rank; what they share is computed once."""

    def __init__(
        self,
        recipe: Recipe,
        rows: LabelledRows,
        train: torch.Tensor,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        """Name what starts are made of.

        Args:
            recipe: settings.
            rows: the layer's trace rows.
            train: (n,) int64, rows to train on.
            generator: source of a random start and of the rows that others are made of.
            device: torch device to train on.
        """
        self._recipe, self._rows, self._train = recipe, rows, train
        self._generator, self._device = generator, device

    def at(self, rank: int) -> Start:
        """Return the start of a rank."""
        gate = self._rows.weights.gate
        if self._recipe.start == "random":
            drawn = random_start(rank, gate.shape[1], len(gate), self._generator)
            return Start(self._recipe, drawn.to(self._device))
        constant = self._recipe.start == "constant" and rank <= gate.shape[1] + 1
        if not constant or self._whitened is None:
            factor, directions = self._paired
            return Start(self._recipe.with_pairs(), pairs_start(directions, factor, rank))
        seen = self._sample[:_START_ROWS]
        x = self._rows.inputs(seen).to(self._device)
        basis, directions = self._whitened
        predictor, coordinates = constant_start(directions, basis, rank, x)
        _settle(
            predictor,
            coordinates,
            x,
            self._rows.active(seen),
            read_batches(self._recipe, self._rows, self._device, seen[:_SETTLE_ROWS]),
        )
        return Start(self._recipe, predictor, coordinates)

    @cached_property
    def _sample(self) -> torch.Tensor:
        order = torch.randperm(len(self._train), generator=self._generator)
        return self._train[order[:_MOMENT_ROWS]]

    @cached_property
    def _moments(self) -> Moments:
        parts = torch.split(self._sample, _PART)
        return moments_of(self._rows.inputs(part).to(self._device) for part in parts)

    @cached_property
    def _whitened(self) -> tuple[torch.Tensor, Directions] | None:
        """The whitening's basis and the gate in it; None if inputs are constant in no direction."""
        whitening = whitening_of(self._moments)
        if whitening is None:
            return None
        gate = self._rows.weights.gate.to(self._device)
        return whitening.basis, directions_of(gate, whitening.factor)

    @cached_property
    def _paired(self) -> tuple[torch.Tensor, Directions]:
        factor = self._moments.factor
        return factor, directions_of(self._rows.weights.gate.to(self._device), factor)


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
