"""The gradient of the weighted cross-entropy, written out.

With z the logits, σ the logistic function and w the weight of a label, the loss is the mean over
all n·d_ff labels of w·log(1 + e^z) where a neuron is inactive and w·log(1 + e^-z) where it is
active, so its derivative by z is w·σ(z) and w·(σ(z) − 1) over n·d_ff. Active neurons are few: two
passes over all labels and a correction at some places replace those of automatic differentiation.
"""

from __future__ import annotations

import torch
from torch.nn.functional import softplus

from predictor.module import Predictor
from predictor.training.batches import Batch
from predictor.training.coordinates import Coordinates

_SUREST = -30.0
"""Logit below which a neuron is sure to be inactive, 1e-13: what σ makes of less is soon subnormal,
and a processor multiplies such numbers many times slower."""


@torch.no_grad()
def set_gradients(
    predictor: Predictor, batch: Batch, dtype: torch.dtype, coordinates: Coordinates | None = None
) -> None:
    """Set the `grad` of both matrices.

    Args:
        predictor: float32, on the batch's device.
        batch: rows and labels.
        dtype: type of the matrix products; gradients are float32 whatever it is.
        coordinates: what the predictor is in, None for those of the inputs.
    """
    inputs = coordinates.inputs(batch.inputs) if coordinates else batch.inputs
    fc1, fc2, x = (t.to(dtype) for t in (predictor.fc1, predictor.fc2, inputs))
    before = x @ fc1.T
    hidden = before.relu()
    if coordinates:
        hidden = coordinates.hidden(hidden.float(), inputs).to(dtype)
    # σ(z) − 1 needs more digits than bfloat16 has where z is large.
    slope = (hidden @ fc2.T).float().clamp_min_(_SUREST).sigmoid_()
    flat, labels = slope.view(-1), slope.numel()
    positive = (flat[batch.places] - 1) * (batch.positive / labels)
    slope.mul_(batch.negative / labels)
    flat[batch.places] = positive
    slope = slope.to(dtype)
    predictor.fc2.grad = (slope.T @ hidden).float()
    back = slope @ fc2[:, : len(fc1)]
    predictor.fc1.grad = (back.mul_(before > 0).T @ x).float()


def loss_of(logits: torch.Tensor, batch: Batch) -> float:
    """Return the loss of logits (n, d_ff)."""
    flat = logits.reshape(-1)
    found = flat[batch.places]
    positive = batch.positive * softplus(-found) - batch.negative * softplus(found)
    return float(batch.negative * softplus(flat).mean() + positive.sum() / len(flat))
