"""What training needs of a layer's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from architectures.checkpoint import Checkpoint


@dataclass(frozen=True)
class LayerWeights:
    """A layer's weights as seen from the predictor's input.

    Attributes:
        gate: (d_ff, d_model) float32, linear map from the predictor's input to the gate, but for
            the norm's division by the input's length and, where a model has them, biases.
        down_norms: (d_ff,) float32, norm of each column of the down projection.
    """

    gate: torch.Tensor
    down_norms: torch.Tensor


def read_layer_weights(checkpoint: Checkpoint, layer: int) -> LayerWeights:
    """Read one layer.

    RMSNorm scales its input x by γ/rms(x), so the gate is W·diag(γ)·x up to a positive factor.
    LayerNorm also subtracts the mean: W·diag(γ)·(I − 11ᵀ/d)·x, which takes each row's mean off.
    """
    architecture = checkpoint.architecture
    gate = checkpoint.layer_tensor(layer, architecture.gate).float()
    gate = gate * checkpoint.layer_tensor(layer, architecture.ffn_norm).float()
    if architecture.centred:
        gate = gate - gate.mean(1, keepdim=True)
    down = checkpoint.layer_tensor(layer, architecture.ffn_down).float()
    return LayerWeights(gate, torch.linalg.vector_norm(down, dim=0))
