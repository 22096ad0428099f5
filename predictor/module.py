"""The predictor that PowerInfer evaluates: `logits = fc2 · relu(fc1 · x)`, without biases.

Source: PowerInfer@d3ebd7c llama.cpp:llm_build_ffn_sparse; a neuron is skipped iff its logit is
below the threshold (ggml.c:ggml_compute_forward_mul_mat_sparse).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear

from common.element_types import F16, Q4_0
from common.rounding import to_f16, to_q8_0

_VECTORS = {F16: to_f16, Q4_0: to_q8_0}
"""How the vector is rounded that multiplies a matrix of a type (ggml.c:type_traits)."""


class Predictor(nn.Module):
    """A low-rank two-layer predictor of one FFN layer."""

    def __init__(self, fc1: torch.Tensor, fc2: torch.Tensor, kind: str = F16) -> None:
        """Wrap weights.

        Args:
            fc1: (rank, d_model) float32.
            fc2: (d_ff, rank) float32.
            kind: type that both are stored in, whose numbers they already are once the predictor is
                to be measured.
        """
        super().__init__()
        self.fc1 = nn.Parameter(fc1)
        self.fc2 = nn.Parameter(fc2)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (rows, d_ff) for inputs (rows, d_model)."""
        return linear(torch.relu(linear(x, self.fc1)), self.fc2)

    def on(self, device: torch.device) -> Predictor:
        """Return the predictor with its weights on a device, detached; itself if they are."""
        if self.fc1.device == device:
            return self
        fc1, fc2 = self.fc1.detach().to(device), self.fc2.detach().to(device)
        return Predictor(fc1, fc2, self.kind)


def to_half(predictor: Predictor) -> Predictor:
    """Round a threshold-0 predictor to float16 without changing what it decides.

    A positive factor on a hidden unit that is taken back in its fc2 column, and any positive factor
    on an fc2 row, leave the sign of every logit alone. So hidden rows are scaled to norm 1, which
    keeps `fc1 · x` within float16 for every residual that is, and fc2 rows to a largest entry of 1,
    which uses float16's precision best.

    Returns:
        Predictor whose float32 weights are exact float16 values.
    """
    fc1, fc2 = predictor.fc1.detach(), predictor.fc2.detach()
    units = torch.linalg.vector_norm(fc1, dim=1).clamp_min(1e-30)
    fc2 = fc2 * units
    fc1 = fc1 / units[:, None]
    fc2 = fc2 / fc2.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    return Predictor(fc1.half().float(), fc2.half().float())


@torch.inference_mode()
def logits_of(predictor: Predictor, inputs: torch.Tensor) -> torch.Tensor:
    """Return the logits (..., d_ff) of inputs (..., d_model) as PowerInfer rounds them.

    Float16 matrices are multiplied with float16 vectors, Q4_0's with Q8_0's (ggml.c:type_traits);
    sums are float32.
    """
    rounded = _VECTORS[predictor.kind]
    hidden = torch.relu(linear(rounded(inputs), predictor.fc1))
    return linear(rounded(hidden), predictor.fc2)


@torch.inference_mode()
def decide(predictor: Predictor, inputs: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return (rows, d_ff) bool for inputs (rows, d_model): true unless logit < threshold."""
    return logits_of(predictor, inputs).lt(threshold).logical_not()
