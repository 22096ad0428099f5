"""What a layer would compute and lose under each of many global thresholds, in one pass.

A threshold decides by comparison alone, so a histogram of the logits with the thresholds as edges
holds every threshold's counts exactly: what is skipped under one is the sum of the bins below it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.decisions import DecisionCounts

_PER_OCTAVE, _LOWEST, _HIGHEST = 8, -6, 16
_TINY = 1e-30


def sweep_factors() -> torch.Tensor:
    """Return (k,) float64 ascending factors: 0 and ±2^(n/8) from 2^-6 to 2^16.

    -1 and 1 are among them. Logits of predictors with threshold 0 have no scale of their own,
    hence the wide range.
    """
    exponents = torch.arange(_LOWEST * _PER_OCTAVE, _HIGHEST * _PER_OCTAVE + 1)
    positive = torch.exp2(exponents.double() / _PER_OCTAVE)
    return torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive])


def sweep_thresholds(threshold: float) -> torch.Tensor:
    """Return (k,) float32 thresholds: `sweep_factors` in units of |threshold|, of 1 if that is 0.

    The threshold itself is one of them.
    """
    return (sweep_factors() * (abs(threshold) or 1.0)).float()


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One layer under every threshold of a sweep.

    Attributes:
        thresholds: (k,) float32, ascending.
        decisions: tokens times neurons.
        active: truly active ones.
        predicted: (k,) int64, decisions to compute.
        hits: (k,) int64, those of them that are truly active.
        missed_importance: (k,) float64, see `reporting.metrics.measure_predictor`; None without
            importance.
        ffn_output_error: (k,) float64, likewise.
    """

    thresholds: torch.Tensor
    decisions: int
    active: int
    predicted: torch.Tensor
    hits: torch.Tensor
    missed_importance: torch.Tensor | None
    ffn_output_error: torch.Tensor | None

    @property
    def density(self) -> torch.Tensor:
        """(k,) float64, share of neurons predicted active: 1 − predicted sparsity."""
        return self.predicted.double() / self.decisions

    @property
    def recall(self) -> torch.Tensor:
        """(k,) float64, activation recall; 1 where nothing is active."""
        if not self.active:
            return torch.ones(len(self.hits), dtype=torch.float64)
        return self.hits.double() / self.active

    def position(self, threshold: float) -> int:
        """Return where `threshold` stands in the sweep that was made around it."""
        return int((self.thresholds == torch.tensor(threshold).float()).nonzero().item())

    def counts(self, position: int) -> DecisionCounts:
        """Return the counts of one threshold."""
        return DecisionCounts(
            decisions=self.decisions,
            active=self.active,
            predicted=int(self.predicted[position]),
            hits=int(self.hits[position]),
        )


class Sweep:
    """Histograms of a layer's logits, summed over batches of rows."""

    def __init__(self, thresholds: torch.Tensor) -> None:
        """Start empty.

        Args:
            thresholds: (k,) float32, ascending.
        """
        self.thresholds = thresholds
        self.rows = 0
        self.all, self.active = (torch.zeros(len(thresholds) + 1).long() for _ in range(2))
        self.importance, self.error = (torch.zeros(len(thresholds) + 1).double() for _ in range(2))
        self.has_importance = True

    def add(
        self,
        logits: torch.Tensor,
        active: torch.Tensor,
        importance: torch.Tensor | None,
        energy: torch.Tensor,
    ) -> None:
        """Count a batch.

        Args:
            logits: (n, d_ff) float32.
            active: (n, d_ff) bool.
            importance: (n, d_ff) float32, or None where the traces hold none.
            energy: (n,) float32, ‖x‖² of each row.
        """
        # The number of thresholds at or below a logit: it is skipped by all the others.
        bins = torch.bucketize(logits, self.thresholds, out_int32=True, right=True)
        mine = bins[active]
        self.rows += len(logits)
        self.all += self._histogram(bins.flatten())
        self.active += self._histogram(mine)
        if importance is None:
            self.has_importance = False
            return
        relative = importance.square() / energy.clamp_min(_TINY)[:, None]
        self.importance += self._histogram(mine, importance[active].double())
        self.error += self._histogram(mine, relative[active].double())

    def _histogram(self, bins: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        return torch.bincount(bins, weights, minlength=len(self.thresholds) + 1)

    def curve(self) -> Curve:
        """Return what every threshold computes and loses."""
        everything, active = int(self.all.sum()), int(self.active.sum())
        missed = self.importance.cumsum(0) / self.importance.sum().clamp_min(_TINY)
        error = self.error.cumsum(0) / max(1, self.rows)
        return Curve(
            thresholds=self.thresholds,
            decisions=everything,
            active=active,
            predicted=everything - self.all.cumsum(0)[:-1],
            hits=active - self.active.cumsum(0)[:-1],
            missed_importance=missed[:-1] if self.has_importance else None,
            ffn_output_error=error[:-1] if self.has_importance else None,
        )
