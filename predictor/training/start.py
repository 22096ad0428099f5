"""Where training starts: at random, or at the best low-rank approximation of the gate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from common.element_types import F16
from predictor.feedback import feedback_of
from predictor.module import Predictor
from predictor.size import Size
from predictor.stored import LayerPredictor
from predictor.traces.rows import LabelledRows
from predictor.training.coordinates import Coordinates, Moments, Whitening, whitening_of
from predictor.training.loss import Batch, loss_of, read_batches
from predictor.training.settings import Recipe
from predictor.training.storing import constant_units, in_float16, in_q4_0

MOMENT_ROWS = 32768
_ROWS_PER_INPUT = 32
_START_ROWS = 2048
_SETTLE_ROWS = 512
_PART = 2048
_FACTORS = (1.0, 1.5, 2.0, 3.0)
_USUAL = 1
"""Place of the factor that the scale is chosen with."""

_SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_OFFSETS = (0.5, 8.0)
"""Of units, in standard deviations."""

_LEAST_CONSTANT = 0.05
_NEURONS = 1024

_BEYOND = 64
"""Directions of the gate, beyond one for each unit, that units are trained within: more of them
take time and lead to worse predictors (docs/decisions/0021)."""

_SPARE, _POWERS = 16, 2
"""Of `leading`: columns beyond those that are wanted, and multiplications."""


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


def start_sample(recipe: Recipe, train: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw the rows that starts are made of from `train`, (n,) int64; a random start needs none."""
    if recipe.start == "random":
        return train[:0]
    order = torch.randperm(len(train), generator=generator)
    return train[order[:MOMENT_ROWS]]


class Starter:
    """Makes the starts of a layer, of any rank; what they share is computed once."""

    def __init__(self, recipe: Recipe, rows: LabelledRows, sample: torch.Tensor) -> None:
        """Name what starts are made of.

        Args:
            recipe: settings.
            rows: the layer's trace rows, for the device to train on.
            sample: (n,) int64, rows to measure inputs on, from `start_sample`.
        """
        self._recipe, self._rows, self._sample = recipe, rows, sample

    def at(self, size: Size, generator: torch.Generator) -> Start:
        """Return the start of a predictor of some size.

        Args:
            size: its type and rank; where the type takes the constant apart in several units, there
                are fewer of them to train.
            generator: source of a random start; others draw nothing.
        """
        gate, rank = self._rows.weights.gate, size.rank
        if self._recipe.start == "random":
            drawn = random_start(rank, gate.shape[1], len(gate), generator)
            return Start(self._recipe, drawn.to(self._rows.device))
        constant = self._recipe.start == "constant" and rank <= gate.shape[1] + 1
        if not constant or self._whitened is None:
            factor, scaled = self._paired
            pairs = pairs_start(leading(scaled, rank // 2), factor, rank)
            return Start(self._recipe.with_pairs(), pairs)
        rows, seen = self._seen
        x = rows.inputs(seen)
        whitening, scaled = self._whitened
        directions = leading(scaled, min(scaled.shape[1], rank + _BEYOND))
        units = rank + 1 - constant_units(size.kind)
        predictor, coordinates = constant_start(directions, whitening, units, x)
        _settle(
            predictor,
            coordinates,
            x,
            rows.active(seen),
            read_batches(self._recipe, rows, seen[:_SETTLE_ROWS]),
        )
        return Start(self._recipe, predictor, coordinates)

    def store(self, start: Start, trained: Predictor, kind: str) -> LayerPredictor:
        """Return a trained predictor as it is stored.

        Args:
            start: what it was trained from.
            trained: of the inputs themselves, float32.
            kind: type to store it in.
        """
        if kind == F16:
            return in_float16(trained)
        rows, seen = self._seen
        length = 1.0
        if self._recipe.normalise and len(seen):
            length = float(rows.rows.inputs_at(seen).square().mean().sqrt())
        constant = start.coordinates is not None
        feedback = None if self._recipe.start == "random" else self._feedback
        return in_q4_0(trained, rows.inputs(seen), length, feedback, constant=constant)

    @property
    def _seen(self) -> tuple[LabelledRows, torch.Tensor]:
        """Rows that stand for all, and their index in them."""
        return self._rows.at_hand(self._sample[:_START_ROWS])

    @cached_property
    def _moments(self) -> Moments:
        sample = self._sample[: _ROWS_PER_INPUT * self._rows.weights.gate.shape[1]]
        parts = self._rows.parts(sample, _PART)
        return moments_of(rows.inputs(part) for rows, part in parts)

    @cached_property
    def _feedback(self) -> torch.Tensor:
        return feedback_of(self._moments.damped)

    @cached_property
    def _whitened(self) -> tuple[Whitening, torch.Tensor] | None:
        """The whitening and the gate in it; None if inputs are constant in no direction."""
        whitening = whitening_of(self._moments)
        return None if whitening is None else (whitening, self._gate(whitening.factor))

    @cached_property
    def _paired(self) -> tuple[torch.Tensor, torch.Tensor]:
        factor = self._moments.factor
        return factor, self._gate(factor)

    def _gate(self, factor: torch.Tensor) -> torch.Tensor:
        return scaled_gate(self._rows.weights.gate.to(self._rows.device), factor)


@torch.no_grad()
def _settle(
    predictor: Predictor,
    coordinates: Coordinates,
    x: torch.Tensor,
    active: torch.Tensor,
    batches: Sequence[Batch],
) -> None:
    """Give a start the scale of logits that has the least loss, and then the biases.

    Biases let every neuron be predicted so many times as often as it is active, which also makes up
    for biases and thresholds that the gate does not show. The better the start is, the surer it may
    be.
    """

    def hidden(x: torch.Tensor) -> torch.Tensor:
        inputs = coordinates.inputs(x)
        return coordinates.hidden((inputs @ predictor.fc1.T).relu(), inputs)

    seen = [(hidden(batch.inputs), batch) for batch in batches]

    def losses(bias: torch.Tensor, scales: Sequence[float]) -> torch.Tensor:
        predictor.fc2[:, -1] = bias
        found = torch.zeros(len(scales), device=x.device)
        for units, batch in seen:
            logits = units @ predictor.fc2.T
            found += torch.stack([loss_of(logits * scale, batch) for scale in scales])
        return found

    biases = matching_biases(hidden(x), predictor.fc2, active, _FACTORS)
    scale = _SCALES[int(losses(biases[_USUAL], _SCALES).argmin())]
    factor = torch.cat([losses(bias, [scale]) for bias in biases]).argmin()
    predictor.fc2[:, -1] = biases[factor]
    predictor.fc2.mul_(scale)


def random_start(rank: int, d_model: int, d_ff: int, generator: torch.Generator) -> Predictor:
    """Draw both matrices as `torch.nn.Linear` does: uniform within 1/sqrt(fan-in)."""

    def uniform(rows: int, columns: int) -> torch.Tensor:
        weight = torch.empty(rows, columns)
        return weight.uniform_(-(columns**-0.5), columns**-0.5, generator=generator)

    return Predictor(uniform(rank, d_model), uniform(d_ff, rank))


def moments_of(parts: Iterable[torch.Tensor]) -> Moments:
    """Return the moments of rows that come in parts (n, d_model)."""
    second, first, rows = torch.zeros(()), torch.zeros(()), 0
    for part in parts:
        second, first = second + part.T @ part, first + part.sum(0)
        rows += len(part)
    return Moments(second / rows, first / rows)


@dataclass(frozen=True)
class Directions:
    """The first right singular vectors of a whitened gate, and the gate along them.

    Attributes:
        right: (d_model, k) float32, orthonormal columns, the first ones first.
        left: (d_ff, k) float32, U·Σ.
    """

    right: torch.Tensor
    left: torch.Tensor


def scaled_gate(gate: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return a gate in whitened coordinates, (d_ff, d_model) float32, its rows of norm 1.

    Args:
        gate: (d_ff, d_model) float32, gate matrix times the norm's weight.
        factor: (d_model, d_model) float64, Cholesky factor of the inputs' moments, on its device.
    """
    scaled = gate @ factor.float()
    return scaled.div_(torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp_min_(1e-30))


def leading(scaled: torch.Tensor, count: int) -> Directions:
    """Return the first `count` directions of (d_ff, d_model) float32.

    Where a few of many are wanted they are found in what powers of the matrix leave of a random
    subspace (arXiv 0909.4061, algorithm 4.4), which is always the same.
    """
    d_model = scaled.shape[1]
    width = min(d_model, count + _SPARE)
    if width == d_model:
        space = torch.eye(d_model, device=scaled.device)
    else:
        drawn = torch.randn(d_model, width, generator=torch.Generator().manual_seed(0))
        space = drawn.to(scaled.device)
        for _ in range(_POWERS):
            space = torch.linalg.qr(scaled.T @ (scaled @ space)).Q
    seen = scaled @ space
    vectors = torch.linalg.eigh((seen.T @ seen).double()).eigenvectors.flip(1)[:, :count].float()
    return Directions(space @ vectors, seen @ vectors)


def pairs_start(directions: Directions, factor: torch.Tensor, rank: int) -> Predictor:
    """Return the activation-whitened truncated SVD of the gate as pairs of units.

    With S Sᵀ = E[x xᵀ] and W the gate matrix, its rows scaled so that every neuron's gate has unit
    second moment, the rank-k matrix A that minimises E‖(W − A)x‖² is the truncated SVD of W·S times
    S⁻¹ (arXiv 2603.14110 whitens by the Cholesky factor likewise). A linear map of rank k takes
    2k ReLU units: `[V; −V]` and `[U, −U]`, because relu(a) − relu(−a) = a.

    Args:
        directions: of the gate and S, at least half of `rank`.
        factor: S, see `Moments.factor`.
        rank: ReLU units, even.
    """
    u, right = directions.left[:, : rank // 2], directions.right[:, : rank // 2].double()
    v = torch.linalg.solve_triangular(factor, right.T, upper=False, left=False).float()
    return Predictor(torch.cat([v, -v]), torch.cat([u, -u], dim=1))


@torch.no_grad()
def constant_start(
    directions: Directions, whitening: Whitening, rank: int, x: torch.Tensor
) -> tuple[Predictor, Coordinates]:
    """Return the truncated SVD of the gate with a unit for the constant, in its coordinates.

    The same approximation as `pairs_start`'s, of rank `rank` − 1 and of what is not constant. Every
    unit is signed for its smaller side to be the closed one, and its offset keeps it open on all
    of `x`, or up to 8 standard deviations. Biases are 0.

    Args:
        directions: of the gate and the whitening's factor, at least `rank` − 1; units are trained
            within them.
        whitening: of the inputs.
        rank: ReLU units, at most d_model + 1.
        x: (n, d_model) float32, normalised inputs.
    """
    units, basis = rank - 1, whitening.basis(directions.right)
    inputs = x @ basis
    relative = inputs[:, :units] / inputs[:, -1:].clamp_min(_LEAST_CONSTANT)
    low, high = -relative.amin(0), relative.amax(0)
    signs = torch.where(low <= high, 1.0, -1.0)
    offsets = torch.minimum(low, high).clamp(*_OFFSETS)
    fc1 = torch.zeros(units, basis.shape[1], device=x.device)
    fc1[:, :units], fc1[:, -1] = signs.diag(), offsets
    fc2 = torch.zeros(len(directions.left), rank, device=x.device)
    fc2[:, :units] = directions.left[:, :units] * signs
    return Predictor(fc1, fc2), Coordinates(basis, offsets)


@torch.no_grad()
def matching_biases(
    hidden: torch.Tensor, fc2: torch.Tensor, active: torch.Tensor, factors: Sequence[float]
) -> torch.Tensor:
    """Return biases with which neurons are predicted in proportion to how often they are active.

    Args:
        hidden: (n, units + 1) float32, the last column s.
        fc2: (d_ff, units + 1) float32; its biases are not looked at.
        active: (n, d_ff) bool.
        factors: how many times as often.

    Returns:
        (factors, d_ff) float32.
    """
    biases, rows = [], len(hidden)
    relative = hidden[:, :-1] / hidden[:, -1:].clamp_min(_LEAST_CONSTANT)
    counts = active.sum(0)
    wanted = torch.stack([(counts * factor).long().clamp_max(rows) for factor in factors])
    for matrix, many in zip(
        torch.split(fc2[:, :-1], _NEURONS), torch.split(wanted, _NEURONS, dim=1), strict=True
    ):
        logits = _sorted(matrix @ relative.T)
        # Past the last row on either side, none or all are predicted.
        before, after = 2 * logits[:, :1] - logits[:, 1:2], 2 * logits[:, -1:] - logits[:, -2:-1]
        logits = torch.cat([before, logits, after], dim=1)
        edges = (logits[:, :-1] + logits[:, 1:]) / 2
        biases.append(-edges.gather(1, (rows - many).T))
    return torch.cat(biases).T


def _sorted(values: torch.Tensor) -> torch.Tensor:
    """Return values with every row in ascending order."""
    if values.device.type != "cpu":
        return values.sort(dim=1).values
    # NumPy sorts many times as fast as torch does on a CPU.
    return torch.from_numpy(np.sort(values.numpy()))
