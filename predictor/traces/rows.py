"""Random access to a layer's trace rows in the form that training eats."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from predictor.traces.layer_rows import StoredRows
from predictor.traces.packing import active_places, decode_importance, unpack_active

_TINY = 1e-20


def normalise_rms(inputs: torch.Tensor) -> torch.Tensor:
    """Scale every row (n, d_model) to unit root mean square."""
    return inputs * torch.rsqrt(inputs.square().mean(dim=-1, keepdim=True) + _TINY)


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

    def importance(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n, d_ff) float32 |act(g)·u|·‖down column‖ as stored, zero where not active."""
        dense = torch.zeros(len(index), self.d_ff)
        places, values = self._active(index, importance=True)
        dense.view(-1)[places] = values
        return dense

    def positives(
        self, index: torch.Tensor, *, importance: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the labels to train on as places, a few per cent of all.

        Args:
            index: (n,) int64, the chosen rows.
            importance: whether importance is wanted.

        Returns:
            Places in (n, d_ff), flattened, (k,) int64 in order, and the importance at each, (k,)
            float32, empty if not wanted.
        """
        places, values = self._active(index, importance=importance or bool(self.top))
        if not self.top:
            return places, values
        magnitude = torch.zeros(len(index), self.d_ff)
        neuron_norms = self.weights.down_norms.clamp_min(1e-30)[places % self.d_ff]
        magnitude.view(-1)[places] = values / neuron_norms
        largest = magnitude.topk(self.top, dim=1).indices
        kept = torch.zeros(magnitude.shape, dtype=torch.bool).scatter_(1, largest, True)
        chosen = (kept & (magnitude > 0)).view(-1)[places]
        return places[chosen], values[chosen]

    def _active(
        self, index: torch.Tensor, *, importance: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        row, neuron = active_places(self.rows.active_at(index))
        places = row * self.d_ff + neuron
        if not importance:
            return places, torch.empty(0)
        codes = self.rows.codes_at(index, torch.bincount(row, minlength=len(index)))
        relative = decode_importance(codes, self.rows.importance_bits)
        return places, relative * self.rows.scale_at(index)[row]

    def contributions(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what each active neuron adds to the residual stream.

        Args:
            index: (n,) int64, the chosen rows.

        Returns:
            Places of active neurons in (n, d_ff), uncut, flattened, (k,) int64 in order, and at
            each importance² / ‖x‖², (k,) float32: what is added, squared, relative to the stream's
            own square, whatever `normalise` says.

        Raises:
            TraceError: some inputs are NaN or infinite.
        """
        places, importance = self._active(index, importance=True)
        squares = self.residual_squares(index).clamp_min(_TINY)
        return places, importance.square_().div_(squares[places // self.d_ff])
