"""The FFN on vLLM's parallel projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_operators.reference import rounded_threshold


class GatedFFN(nn.Module):
    """`down(act(gate(x)) * up(x))` with an activation that makes zeros."""

    def __init__(self, mlp: Any, activation: str, threshold: float) -> None:
        """Take over the projections of vLLM's LlamaMLP.

        Args:
            mlp: has `gate_up_proj` and `down_proj`.
            activation: `relu`, `fatrelu` or `drelu`.
            threshold: FATReLU passes values from this on; 0 for the others.
        """
        super().__init__()
        self.gate_up_proj, self.down_proj = mlp.gate_up_proj, mlp.down_proj
        self.double_relu = activation == "drelu"
        self.threshold = rounded_threshold(threshold, torch.get_default_dtype())

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (tokens, d_model) for `x` (tokens, d_model)."""
        gate_up, _ = self.gate_up_proj(x)
        y, _ = self.down_proj(activate(gate_up, self.threshold, self.double_relu))
        return y  # type: ignore[no-any-return]


def activate(gate_up: Tensor, threshold: float, double_relu: bool) -> Tensor:
    """Return `act(gate) * up` (tokens, d_ff) of both, (tokens, 2 * d_ff).

    Args:
        gate_up: the gate's scores, then the up projection.
        threshold: 0 for ReLU, T for FATReLU, as the scores' type holds it.
        double_relu: `up`, too, passes a ReLU.
    """
    gate, up = gate_up.chunk(2, -1)
    gate = torch.where(gate >= threshold, gate, 0) if threshold else gate.relu()
    return gate * (up.relu() if double_relu else up)
