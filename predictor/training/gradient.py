"""The gradient of the weighted cross-entropy, written out.

With z the logits, σ the logistic function and w the weight of a label, the loss is the mean over
all n·d_ff labels of w·log(1 + e^z) where a neuron is inactive and w·log(1 + e^-z) where it is
active, so its derivative by z is w·σ(z) and w·(σ(z) − 1) over n·d_ff. Active neurons are few: two
passes over all labels and a correction at some places replace those of automatic differentiation.
"""

from __future__ import annotations

import torch

from predictor.module import Predictor
from predictor.training.batches import Batch


@torch.no_grad()
def set_gradients(predictor: Predictor, batch: Batch, dtype: torch.dtype) -> None:
    """Set the `grad` of both matrices.

    Args:
        predictor: float32, on the batch's device.
        batch: rows and labels.
        dtype: type of the matrix products; gradients are float32 whatever it is.
    """
    fc1, fc2, x = (t.to(dtype) for t in (predictor.fc1, predictor.fc2, batch.inputs))
    before = x @ fc1.T
    hidden = before.relu()
    # σ(z) − 1 needs more digits than bfloat16 has where z is large.
    slope = (hidden @ fc2.T).float().sigmoid_()
    flat, labels = slope.view(-1), slope.numel()
    positive = (flat[batch.places] - 1) * (batch.positive / labels)
    slope.mul_(batch.negative / labels)
    flat[batch.places] = positive
    slope = slope.to(dtype)
    predictor.fc2.grad = (slope.T @ hidden).float()
    predictor.fc1.grad = ((slope @ fc2).mul_(before > 0).T @ x).float()
