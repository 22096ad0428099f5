"""Trained predictors in the type that they are stored in, with what its rounding costs made good.

In float16 a predictor is as good as in float32. Q4_0 has 16 steps a block. A unit for the constant
(`predictor.training.coordinates`) whose column outweighs all others would leave its block's other
units none of them, so it comes twice: once large enough for its column to be as small as theirs,
and once at an eighth of that, which takes what the first one's steps leave. fc1 is rounded with
feedback; fc2 is fitted anew to what its rounded rows and 8-bit vectors give, and rounded likewise.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from common.element_types import F16
from common.rounding import BLOCK, to_q8_0, unpack_q4_0
from predictor.feedback import by_itself, damped, feedback_of, with_feedback
from predictor.module import Predictor, to_half
from predictor.stored import LayerPredictor

_SECOND_DIGIT = 1 / 8
_LARGEST_FIRST = 64.0
_MOST_NEURONS = 0.9
"""Of neurons, whose largest weight of a unit is to be larger than that of the constant."""

_DAMPING = 1e-4
_ROWS = 2048


def constant_units(kind: str) -> int:
    """Return how many units stand for the constant in a type."""
    return 1 if kind == F16 else 2


def in_float16(predictor: Predictor) -> LayerPredictor:
    """Return a float32 predictor in float16, see `to_half`."""
    half = to_half(predictor)
    return LayerPredictor(half.fc1.detach().half(), half.fc2.detach().half(), None)


@torch.no_grad()
def in_q4_0(
    predictor: Predictor,
    inputs: torch.Tensor,
    length: float,
    feedback: torch.Tensor | None,
    *,
    constant: bool,
) -> LayerPredictor:
    """Return a predictor in Q4_0.

    Args:
        predictor: float32, as it was trained; its last unit is the constant where there is one, and
            it has one unit less then than what is returned.
        inputs: (n, d_model) float32, what it was trained on, on the device to compute on.
        length: by which these are shorter than the residuals that it will read, in the mean.
        feedback: of the inputs, see `feedback_of`; without it every number becomes the nearest.
        constant: whether the last unit is the constant.
    """
    fc1, fc2 = (matrix.detach().to(inputs.device) for matrix in predictor.parameters())
    if constant:
        fc1, fc2 = _with_digits(fc1, fc2)
    # What is left of logits stays what it was; both matrices keep far from float16's limits.
    root = length**-0.5
    if feedback is None:
        units, rows = (by_itself(matrix * root) for matrix in (fc1, fc2))
        return LayerPredictor(units.cpu(), rows.cpu(), None)
    units = with_feedback(fc1 * root, feedback)
    second, crossed = _moments(fc1, unpack_q4_0(units) / root, inputs)
    second = damped(second, _DAMPING)
    fitted = fc2.double() @ torch.linalg.solve(second, crossed).T
    rows = with_feedback(fitted.float() * root, feedback_of(second))
    return LayerPredictor(units.cpu(), rows.cpu(), None)


def _with_digits(fc1: torch.Tensor, fc2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the constant two units in place of the last one."""
    column, last = fc2[:, -1].abs(), fc2[:, 1 - BLOCK : -1]
    ratio = column / last.abs().amax(1).clamp_min(1e-30)
    first = float(ratio.quantile(_MOST_NEURONS).clamp(1.0, _LARGEST_FIRST))
    direction = fc1[-1:]
    units = torch.cat([fc1[:-1], first * direction, first * _SECOND_DIGIT * direction])
    nothing = torch.zeros_like(fc2[:, -1:])
    return units, torch.cat([fc2[:, :-1], fc2[:, -1:] / first, nothing], dim=1)


def _moments(
    fc1: torch.Tensor, rounded: torch.Tensor, inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare hidden units.

    Args:
        fc1: (rank, d_model) float32.
        rounded: the same in Q4_0.
        inputs: (n, d_model) float32.

    Returns:
        E[r rᵀ] and E[r hᵀ], both (rank, rank) float64, of the units r that rounding gives and h
        that were trained.
    """
    second = torch.zeros(len(fc1), len(fc1), dtype=torch.float64, device=fc1.device)
    crossed = torch.zeros_like(second)
    for part in torch.split(inputs, _ROWS):
        trained = linear(part, fc1).relu()
        found = to_q8_0(linear(to_q8_0(part), rounded).relu())
        second += (found.T @ found).double()
        crossed += (found.T @ trained).double()
    return second / len(inputs), crossed / len(inputs)
