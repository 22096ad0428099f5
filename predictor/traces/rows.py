"""Random access to a layer's trace rows in the form that training eats."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from predictor.traces.bits import active_places, unpack_active
from predictor.traces.importance import decode_importance
from predictor.traces.layer_rows import StoredRows
from predictor.traces.layer_weights import LayerWeights

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

    rows: StoredRows
    weights: LayerWeights
    normalise: bool
    top: int = 0

    @property
    def d_ff(self) -> int:
        """Neurons of the layer."""
        return len(self.weights.down_norms)

    def inputs(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n, d_model) float32 inputs of the chosen rows, scaled if asked for.

        Raises:
            TraceError: some are NaN or infinite.
        """
        inputs = self.raw(index)
        return normalise_rms(inputs) if self.normalise else inputs

    def raw(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n, d_model) float32 inputs of the chosen rows as stored.

        Raises:
            TraceError: some are NaN or infinite.
        """
        return self.rows.inputs_at(index)

    def residual_squares(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n,) float32 ‖x‖² of the chosen rows' inputs as stored.

        Raises:
            TraceError: some are NaN or infinite.
        """
        return self.raw(index).square().sum(1)

    def active(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n, d_ff) bool labels of the chosen rows, uncut."""
        return unpack_active(self.rows.active_at(index), self.d_ff)

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
        row, neuron = active_places(self.rows.active_at(index))
        codes = self.rows.codes_at(index, torch.bincount(row, minlength=len(index)))
        relative = decode_importance(codes, self.rows.importance_bits)
        importance = torch.zeros(len(index), self.d_ff)
        importance.view(-1)[row * self.d_ff + neuron] = relative * self.rows.scale_at(index)[row]
        return importance

    def relative_importance(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n, d_ff) float32 importance² / ‖x‖².

        What each neuron adds to the residual stream, squared, relative to the stream's own square,
        whatever `normalise` says.

        Raises:
            TraceError: some inputs are NaN or infinite.
        """
        squares = self.residual_squares(index).clamp_min(_TINY)
        return self.importance(index).square_().div_(squares[:, None])
