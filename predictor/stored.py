"""A layer's predictor in the type that it is stored in, from which it is exported as it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from common.element_types import ELEMENT_TYPES, F16, Q4_0
from common.rounding import scale_q4_0, unpack_q4_0
from predictor.module import Predictor


@dataclass(frozen=True)
class LayerPredictor:
    """One layer's predictor as it will be exported.

    Attributes:
        fc1: (rank, d_model) float16, or its rows in Q4_0 blocks, uint8.
        fc2: (d_ff, rank) likewise.
        activation_counts: (d_ff,) int64, tokens on which each neuron was active; None only for
            predictors of others that come without.
    """

    fc1: torch.Tensor
    fc2: torch.Tensor
    activation_counts: torch.Tensor | None

    @property
    def kind(self) -> str:
        """Its type, `f16` or `q4_0`."""
        return Q4_0 if self.fc1.dtype == torch.uint8 else F16

    @property
    def rank(self) -> int:
        """Hidden units."""
        return len(self.fc1)

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of both matrices, as numbers."""
        element = ELEMENT_TYPES[self.kind]
        items = element.row_items(element.block)
        fc1, fc2 = (
            (len(each), each.shape[-1] // items * element.block) for each in (self.fc1, self.fc2)
        )
        return fc1, fc2

    def numbers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return fc1 (rank, d_model) and fc2 (d_ff, rank), float32."""
        fc1, fc2 = self.fc1, self.fc2
        if self.kind == F16:
            return fc1.float(), fc2.float()
        return unpack_q4_0(fc1), unpack_q4_0(fc2)

    def predictor(self) -> Predictor:
        """Return it as it is computed."""
        return Predictor(*self.numbers(), self.kind)

    def folded(self, thresholds: torch.Tensor) -> LayerPredictor:
        """Divide each row of fc2 by the size of its neuron's threshold, (d_ff,) float32.

        Returns:
            A predictor for a threshold of 1 or -1; a row of zeros where the neuron's is infinite.
        """
        if self.kind == F16:
            fc2 = (self.fc2.float() / thresholds.abs()[:, None]).half()
        else:
            fc2 = scale_q4_0(self.fc2, 1 / thresholds.abs())
        return replace(self, fc2=fc2)
