"""Decisions about neurons, counted and turned into the glossary's metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass
class DecisionCounts:
    """Counts of one layer, summed over tokens.

    Attributes:
        decisions: tokens times neurons.
        active: truly active ones.
        predicted: those predicted active.
        hits: those both active and predicted.
    """

    decisions: int = 0
    active: int = 0
    predicted: int = 0
    hits: int = 0

    def add(self, active: torch.Tensor, predicted: torch.Tensor) -> None:
        """Count a batch: two bool tensors of one shape."""
        self.decisions += active.numel()
        self.active += int(active.sum())
        self.predicted += int(predicted.sum())
        self.hits += int((active & predicted).sum())

    def metrics(
        self,
        *,
        rank: int,
        d_model: int,
        d_ff: int,
        ffn_matrices: int = 3,
        predictor_width: float = 1.0,
    ) -> dict[str, float]:
        """Return the layer's metrics as fractions.

        Recall is pooled over tokens: Σ predicted∧active / Σ active, 1 where nothing is active;
        precision likewise, 1 where nothing is predicted. The FFN bytes ratio is what a decoded
        token reads relative to dense: (predictor bytes + predicted-active share × FFN bytes) /
        FFN bytes.

        The arguments are those of `predictor_share`.
        """
        sizes = {"d_model": d_model, "d_ff": d_ff, "ffn_matrices": ffn_matrices}
        return self.metrics_with(predictor_share(rank, predictor_width=predictor_width, **sizes))

    def metrics_with(self, predictor: float) -> dict[str, float]:
        """Return the same, given the bytes of the predictor relative to its FFN."""
        predicted = self.predicted / self.decisions
        return {
            "activation_sparsity": 1 - self.active / self.decisions,
            "activation_recall": self.hits / self.active if self.active else 1.0,
            "precision": self.hits / self.predicted if self.predicted else 1.0,
            "predicted_sparsity": 1 - predicted,
            "ffn_bytes_ratio": predictor + predicted,
        }


def predictor_share(
    rank: int, *, d_model: int, d_ff: int, ffn_matrices: int, predictor_width: float
) -> float:
    """Return the bytes of a predictor relative to its FFN.

    Args:
        rank: hidden units of the predictor.
        d_model: hidden size.
        d_ff: neurons of the layer.
        ffn_matrices: matrices of the FFN, 3 if gated, else 2.
        predictor_width: bytes of a predictor's weight relative to one of the FFN.
    """
    return predictor_width * rank * (d_model + d_ff) / (ffn_matrices * d_model * d_ff)


def mean_metrics(layers: list[dict[str, float]]) -> dict[str, float]:
    """Return the arithmetic mean over layers of every metric, to the bit whatever their order."""
    return {key: math.fsum(each[key] for each in layers) / len(layers) for key in layers[0]}
