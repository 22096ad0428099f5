"""Random access to a layer's trace rows in the form that training eats."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from predictor.bits import unpack_active
from predictor.importance import codes_at, decode_importance
from predictor.layer_weights import LayerWeights
from predictor.traces import LayerRows

_TINY = 1e-20


def normalise_rms(inputs: torch.Tensor) -> torch.Tensor:
    """Scale every row (n, d_model) to unit root mean square."""
    return inputs * torch.rsqrt(inputs.square().mean(dim=-1, keepdim=True) + _TINY)


@dataclass(frozen=True)
class LabelledRows:
    """A layer's rows with labels cut to the largest magnitudes if asked for.

    Attributes:
        rows: the rows as stored.
        weights: the layer's weights.
        normalise: scale inputs to unit root mean square.
        top: keep at most this many labels a token, those of largest magnitude; 0 keeps all.
    """

    rows: LayerRows
    weights: LayerWeights
    normalise: bool
    top: int = 0

    @property
    def d_ff(self) -> int:
        """Neurons of the layer."""
        return len(self.weights.down_norms)

    def inputs(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n, d_model) float32 inputs of the chosen rows."""
        inputs = self.rows.inputs[index].float()
        return normalise_rms(inputs) if self.normalise else inputs

    def active(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n, d_ff) bool labels of the chosen rows, uncut."""
        return unpack_active(self.rows.active[index], self.d_ff)

    def labels(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n, d_ff) bool labels to train on: `active`, cut if asked for."""
        if not self.top:
            return self.active(index)
        magnitude = self.importance(index) / self.weights.down_norms.clamp_min(1e-30)
        largest = magnitude.topk(self.top, dim=1).indices
        kept = torch.zeros(magnitude.shape, dtype=torch.bool).scatter_(1, largest, True)
        return kept & (magnitude > 0)

    def importance(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n, d_ff) float32 |act(g)·u|·‖down column‖ as stored, zero where not active."""
        active = self.active(index)
        counts = active.sum(1)
        # Positions of each row's codes: its start, then one after the other.
        first = torch.cumsum(counts, 0) - counts
        offsets = torch.arange(int(counts.sum())) - torch.repeat_interleave(first, counts)
        positions = torch.repeat_interleave(self.rows.starts[index], counts) + offsets
        bits = self.rows.importance_bits
        relative = decode_importance(codes_at(self.rows.importance, positions, bits), bits)
        importance = torch.zeros(active.shape)
        importance[active] = relative * torch.repeat_interleave(self.rows.scale[index], counts)
        return importance
