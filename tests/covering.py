"""Predictors without training that find every active neuron of a model with LayerNorm and biases.

A predictor has no bias, so it cannot compute such a gate. Its linear part it can, and the constant
becomes a threshold for each neuron: whatever it leaves out is surely not active, so predictions
change nothing, however float16 rounds the logits.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conftest import exact
from families import Written

from architectures.checkpoint import Checkpoint

THRESHOLD = -1.0
_MARGIN, _LONGER = 0.05, 1.5


def write_covering(written: Written, out: Path, tokens: list[int]) -> Path:
    """Write them in PowerInfer's own form; `tokens` tell how long residuals get."""
    checkpoint = Checkpoint.open(written.path)
    family = checkpoint.architecture
    out.mkdir()
    for number, layer in enumerate(written.reference(tokens).layers):
        gate = checkpoint.layer_tensor(number, family.gate).double()
        gate = gate * checkpoint.layer_tensor(number, family.ffn_norm).double()
        gate -= gate.mean(1, keepdim=True)
        centred = layer.residual - layer.residual.mean(1, keepdim=True)
        length = centred.square().mean(1, keepdim=True).sqrt()
        constant = (layer.gate - centred @ gate.T / length).mean(0)
        # Active only if the linear part exceeds -constant · length.
        least = constant.clamp(min=0) * _LONGER * length.max() + _MARGIN
        fc1, fc2 = exact((gate / least[:, None]).float())
        torch.save({"fc1.weight": fc1.half(), "fc2.weight": fc2.half()}, out / f"model_{number}.pt")
    (out / "config.json").write_text(json.dumps({"sparse_threshold": THRESHOLD}))
    return out
