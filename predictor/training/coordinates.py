"""Coordinates in which a predictor is trained: whitened inputs, and a constant.

Residual streams are far from centred: scaled to unit root mean square they have a direction m in
which they are nearly constant, mᵀx ≈ 1. PowerInfer's predictors have no biases, but one ReLU unit
spent on s = mᵀx is as good as biases for all others: with an offset o large enough for no unit to
be closed, relu(vᵀx + o·s) − o·s = vᵀx, and fc2's entry for s takes the o·s back. So r units make a
linear map of rank r − 1, where pairs [V; −V] of units make one of rank r/2, and every neuron has a
bias b·s besides. All of it is an ordinary predictor in the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from predictor.feedback import damped
from predictor.module import Predictor

_DAMPING = 1e-2
_STEADY = 0.25
"""Largest standard deviation of s, whose mean is 1: beyond it s comes too near to zero."""


@dataclass(frozen=True)
class Moments:
    """Of inputs (n, d_model).

    Attributes:
        second: (d_model, d_model) float32, E[x xᵀ].
        mean: (d_model,) float32, E[x].
    """

    second: torch.Tensor
    mean: torch.Tensor

    @property
    def damped(self) -> torch.Tensor:
        """E[x xᵀ] in float64, with a small multiple of the identity added."""
        return damped(self.second, 1e-4)

    @property
    def factor(self) -> torch.Tensor:
        """(d_model, d_model) float64, lower triangular S with S Sᵀ = `damped`."""
        factor: torch.Tensor = torch.linalg.cholesky(self.damped)
        return factor


@dataclass(frozen=True)
class Whitening:
    """x = s·mean + factor·y: what is constant in inputs, and the rest with unit covariance.

    Attributes:
        direction: (d_model,) float64, m with s = mᵀx and mᵀ·mean = 1.
        mean: (d_model,) float64, E[x].
        factor: (d_model, d_model) float64, lower triangular, damped factor of the covariance of
            x − s·mean.
    """

    direction: torch.Tensor
    mean: torch.Tensor
    factor: torch.Tensor

    def basis(self, directions: torch.Tensor) -> torch.Tensor:
        """Return the (d_model, k + 1) float32 matrix that takes rows x to rows [Vᵀy, s].

        Args:
            directions: (d_model, k) float32, V, orthonormal columns.
        """
        upper, wide = self.factor.T, directions.double()
        taken = torch.linalg.solve_triangular(upper, wide, upper=True)
        centred = taken - self.direction[:, None] * (self.mean[None] @ taken)
        return torch.cat([centred, self.direction[:, None]], dim=1).float()


def whitening_of(moments: Moments) -> Whitening | None:
    """Return the whitening of inputs, None if they are constant in no direction.

    m = C⁻¹μ / μᵀC⁻¹μ, with C = E[x xᵀ] and μ = E[x], is the least-squares fit of mᵀx to 1, scaled
    to a mean of 1.
    """
    mean = moments.mean.double()
    direction = torch.linalg.solve(moments.damped, mean)
    strength = direction @ mean
    if strength <= 1 / (1 + _STEADY**2):  # E[s²] = 1/strength
        return None
    direction = direction / strength
    # (I − μmᵀ) E[x xᵀ] (I − mμᵀ), multiplied out.
    second = moments.second.double()
    along = second @ direction
    crossed = torch.outer(along, mean)
    covariance = second - crossed - crossed.T + (direction @ along) * torch.outer(mean, mean)
    factor = torch.linalg.cholesky(damped(covariance, _DAMPING))
    return Whitening(direction, mean, factor)


@dataclass(frozen=True)
class Coordinates:
    """Where fc1 takes whitened inputs and s, and fc2 takes centred hidden units and s.

    Attributes:
        basis: (d_model, k + 1) float32, see `Whitening.basis`.
        centres: (units,) float32, multiple of s that is taken off each hidden unit.
    """

    basis: torch.Tensor
    centres: torch.Tensor

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return [Vᵀy, s], (n, k + 1), of inputs (n, d_model)."""
        return x @ self.basis

    def hidden(self, positive: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Return what fc2 takes, (n, units + 1).

        Args:
            positive: (n, units) float32, relu of fc1's outputs.
            inputs: (n, k + 1) float32, as `inputs` returns them.
        """
        s = inputs[:, -1:]
        return torch.cat([positive - s * self.centres, s], dim=1)

    def plain(self, predictor: Predictor) -> Predictor:
        """Return the predictor of raw inputs that does the same wherever s is positive.

        Args:
            predictor: fc1 (units, k + 1) and fc2 (d_ff, units + 1) in these coordinates.

        Returns:
            fc1 (units + 1, d_model) and fc2 (d_ff, units + 1), detached.
        """
        fc1, fc2 = predictor.fc1.detach(), predictor.fc2.detach()
        rows = torch.cat([fc1 @ self.basis.T, self.basis[:, -1:].T])
        bias = fc2[:, -1:] - fc2[:, :-1] @ self.centres[:, None]
        return Predictor(rows, torch.cat([fc2[:, :-1], bias], dim=1))
