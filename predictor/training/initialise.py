"""Where training starts: at random, or at the best linear approximation of the gate."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from predictor.module import Predictor

_DAMPING = 1e-4


def random_start(rank: int, d_model: int, d_ff: int, generator: torch.Generator) -> Predictor:
    """Draw both matrices as `torch.nn.Linear` does: uniform within 1/sqrt(fan-in)."""

    def uniform(rows: int, columns: int) -> torch.Tensor:
        weight = torch.empty(rows, columns)
        return weight.uniform_(-(columns**-0.5), columns**-0.5, generator=generator)

    return Predictor(uniform(rank, d_model), uniform(d_ff, rank))


def second_moment(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return E[x xᵀ], (d_model, d_model) float32, of rows that come in parts (n, d_model)."""
    total, rows = torch.zeros(()), 0
    for part in parts:
        total, rows = total + part.T @ part, rows + len(part)
    return total / rows


def svd_start(gate: torch.Tensor, moment: torch.Tensor, rank: int) -> Predictor:
    """Return the activation-whitened truncated SVD of the gate as a predictor.

    With S Sᵀ = E[x xᵀ] and W the gate matrix, its rows scaled so that every neuron's gate has unit
    second moment, the rank-k matrix A that minimises E‖(W − A)x‖² is the truncated SVD of W·S times
    S⁻¹ (arXiv 2603.14110 whitens by the Cholesky factor likewise). A linear map of rank k takes
    2k ReLU units: `[V; −V]` and `[U, −U]`, because relu(a) − relu(−a) = a.

    Args:
        gate: (d_ff, d_model) float32, gate matrix times the norm's weight, on the moment's device.
        moment: (d_model, d_model) float32, second moment of the normalised inputs.
        rank: ReLU units, even.
    """
    d_model = len(moment)
    damped = moment + _DAMPING * moment.diagonal().mean() * torch.eye(d_model, device=moment.device)
    factor = torch.linalg.cholesky(damped.double())
    whitened = gate.double() @ factor
    whitened = whitened / torch.linalg.vector_norm(whitened, dim=1, keepdim=True).clamp_min(1e-30)
    # The right singular vectors come from the small Gram matrix: d_ff may be far larger than d.
    _, vectors = torch.linalg.eigh(whitened.T @ whitened)
    right = vectors[:, -(rank // 2) :]
    left = whitened @ right
    down = torch.linalg.solve_triangular(factor, right.T, upper=False, left=False)
    u, v = left.float(), down.float()
    return Predictor(torch.cat([v, -v]), torch.cat([u, -u], dim=1))
