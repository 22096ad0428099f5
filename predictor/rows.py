"""Random access to a layer's trace rows in the form that training eats."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from predictor.magnitude import decode_magnitude
from predictor.traces import LayerRows, unpack_active

_TINY = 1e-20


def normalise_rms(inputs: torch.Tensor) -> torch.Tensor:
    """Scale every row (n, d_model) to unit root mean square."""
    return inputs * torch.rsqrt(inputs.square().mean(dim=-1, keepdim=True) + _TINY)


@dataclass(frozen=True)
class LabelledRows:
    """A layer's rows with labels cut to the largest magnitudes if asked for.

    Attributes:
        rows: the rows as stored.
        d_ff: neurons.
        starts: (rows,) int64, where each row's magnitudes begin.
        normalise: scale inputs to unit root mean square.
        top: keep at most this many labels a token, those of largest magnitude; 0 keeps all.
    """

    rows: LayerRows
    d_ff: int
    starts: torch.Tensor
    normalise: bool
    top: int

    @classmethod
    def make(
        cls, rows: LayerRows, d_ff: int, *, normalise: bool, top_fraction: float | None = None
    ) -> LabelledRows:
        """Index stored rows.

        Args:
            rows: one layer's rows.
            d_ff: neurons.
            normalise: scale inputs to unit root mean square.
            top_fraction: keep the labels of at most this fraction of neurons for each token (0.15
                is the published recipe's clipping); None keeps all.
        """
        per_row = _set_bits(rows.active)
        starts = torch.cumsum(per_row, 0) - per_row
        top = 0 if top_fraction is None else max(1, int(top_fraction * d_ff))
        return cls(rows, d_ff, starts, normalise, top)

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
        magnitude = self.magnitude(index)
        largest = magnitude.topk(self.top, dim=1).indices
        kept = torch.zeros(magnitude.shape, dtype=torch.bool).scatter_(1, largest, True)
        return kept & (magnitude > 0)

    def magnitude(self, index: torch.Tensor) -> torch.Tensor:
        """Return (n, d_ff) float32 |act(g)·u| of active neurons, zero elsewhere."""
        active = self.active(index)
        counts = active.sum(1)
        # Positions of each row's codes: its start, then one after the other.
        first = torch.cumsum(counts, 0) - counts
        offsets = torch.arange(int(counts.sum())) - torch.repeat_interleave(first, counts)
        positions = torch.repeat_interleave(self.starts[index], counts) + offsets
        magnitude = torch.zeros(active.shape)
        magnitude[active] = decode_magnitude(self.rows.magnitude[positions])
        return magnitude


def _set_bits(active: torch.Tensor) -> torch.Tensor:
    bits = torch.tensor([value.bit_count() for value in range(256)])
    return torch.cat([bits[part.long()].sum(1) for part in torch.split(active, 4096)])
