"""How good a layer's predictor is on held-out documents, under each of many global thresholds.

A threshold decides by comparison alone, so a histogram of the logits with the thresholds as edges
holds every threshold's counts exactly: what is skipped under one is the sum of the bins below it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from common.decisions import DecisionCounts
from common.element_types import ELEMENT_TYPES, ElementType
from predictor.module import Predictor, logits_of
from predictor.stored import LayerPredictor
from predictor.traces.rows import LabelledRows

DECISIONS_AT_ONCE = 2**22
"""Decisions of a batch, and of the sample that average precision is taken on."""

_PER_OCTAVE, _LOWEST, _HIGHEST = 8, -6, 16
_TINY = 1e-30


def sweep_thresholds(threshold: float) -> torch.Tensor:
    """Return (k,) float32 ascending thresholds: 0 and ±2^(n/8) from 2^-6 to 2^16, times a unit.

    The unit is |threshold|, 1 if that is 0, so the threshold itself is one of them. Logits of
    predictors with threshold 0 have no scale of their own, hence the wide range.
    """
    exponents = torch.arange(_LOWEST * _PER_OCTAVE, _HIGHEST * _PER_OCTAVE + 1)
    positive = torch.exp2(exponents.double() / _PER_OCTAVE)
    factors = torch.cat([-positive.flip(0), positive.new_zeros(1), positive])
    return (factors * (abs(threshold) or 1.0)).float()


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One layer under every threshold of a sweep.

    Attributes:
        thresholds: (k,) float32, ascending.
        decisions: tokens times neurons.
        active: truly active ones.
        predicted: (k,) int64, decisions to compute.
        hits: (k,) int64, those of them that are truly active.
        missed_importance: (k,) float64, see `measure_predictor`; None without
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


@dataclass(frozen=True, kw_only=True)
class LayerMeasurement:
    """One layer's numbers.

    Attributes:
        layer: number of the layer.
        rank: hidden units of its predictor.
        kind: its type.
        metrics: see `measure_predictor`.
        curve: the layer under a sweep of the global threshold.
        chosen: position in the curve of the threshold that will be exported.
        activation_counts: (d_ff,) int64, tokens on which each neuron was active.
    """

    layer: int
    rank: int
    kind: str
    metrics: dict[str, float]
    curve: Curve
    chosen: int
    activation_counts: torch.Tensor


def sample_rows(d_ff: int, at_once: int = DECISIONS_AT_ONCE) -> int:
    """Return how many rows average precision is taken on at most."""
    return max(1, at_once // d_ff)


def measure_predictor(
    rows: LabelledRows,
    held: torch.Tensor,
    predictor: LayerPredictor,
    *,
    layer: int,
    threshold: float,
    ffn_matrices: int,
    ffn: ElementType,
    seed: int,
    at_once: int = DECISIONS_AT_ONCE,
) -> LayerMeasurement:
    """Measure a predictor on held-out rows, a batch at a time.

    With p predicted (logit >= threshold), a active, c importance = |act·up|·‖down column‖ and x
    the residual that enters the predictor, sums over tokens and neurons:

    ==================== ===========================================================
    activation_sparsity  1 − Σ a / decisions
    activation_recall    Σ p∧a / Σ a; 1 where nothing is active
    precision            Σ p∧a / Σ p; 1 where nothing is predicted
    predicted_sparsity   1 − Σ p / decisions
    ffn_bytes_ratio      predictor bytes / FFN bytes + Σ p / decisions
    average_precision    `average_precision`, logits pooled over neurons and tokens
    missed_importance    Σ c over skipped / Σ c; 0 where nothing is active
    ffn_output_error     mean over tokens of Σ c² over the token's skipped neurons / ‖x‖²
    ==================== ===========================================================

    The last is the squared error of the FFN's output relative to the residual if neurons'
    contributions are orthogonal. The last two are left out where the traces hold no importance, and
    as coarse as its codes: see `predictor.traces.packing`.

    Args:
        rows: the layer's rows, not normalised.
        held: (m,) int64, held-out rows, at least one.
        predictor: the layer's weights as exported.
        layer: number of the layer.
        threshold: a neuron is computed unless its logit is below this.
        ffn_matrices: matrices of the FFN, 3 if gated, else 2.
        ffn: type of the model's matrices.
        seed: seed of the sample for average precision.
        at_once: decisions of a batch and of that sample.
    """
    # A threshold other than 0 is in units of the residual itself.
    assert not rows.normalise
    net, element = predictor.predictor(), ELEMENT_TYPES[predictor.kind]
    batch = sample_rows(rows.d_ff, at_once)
    curve = _sweep(net, rows, torch.split(held, batch), threshold)
    chosen, rank = curve.position(threshold), predictor.rank
    metrics = curve.counts(chosen).metrics(
        rank=element.padded(rank),
        d_model=net.fc1.shape[1],
        d_ff=rows.d_ff,
        ffn_matrices=ffn_matrices,
        predictor_width=element.width / ffn.width,
    )
    metrics["average_precision"] = _sampled_average_precision(net, rows, held, batch, seed)
    for name in ("missed_importance", "ffn_output_error"):
        if (values := getattr(curve, name)) is not None:
            metrics[name] = float(values[chosen])
    return LayerMeasurement(
        layer=layer,
        rank=rank,
        kind=predictor.kind,
        metrics=metrics,
        curve=curve,
        chosen=chosen,
        activation_counts=rows.rows.counts,
    )


@torch.inference_mode()
def _sweep(
    net: Predictor, rows: LabelledRows, batches: Iterable[torch.Tensor], threshold: float
) -> Curve:
    sweep = Sweep(sweep_thresholds(threshold))
    for index in batches:
        inputs, active = rows.inputs(index), rows.active(index)
        importance = rows.importance(index) if rows.rows.importance_bits else None
        sweep.add(logits_of(net, inputs), active, importance, inputs.square().sum(1))
    return sweep.curve()


@torch.inference_mode()
def _sampled_average_precision(
    net: Predictor, rows: LabelledRows, held: torch.Tensor, sample: int, seed: int
) -> float:
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(seed))
    index = held[order[:sample].sort().values]
    return average_precision(logits_of(net, rows.inputs(index)), rows.active(index))


def average_precision(logits: torch.Tensor, active: torch.Tensor) -> float:
    """Return Σ (R_n − R_{n−1}) P_n over the distinct logits, largest first, pooled over everything.

    It tells how well one global threshold could do; per-neuron scales of `fc2` are part of it.
    1 where nothing is active, as recall. The same as scikit-learn's `average_precision_score`, in a
    sixth of the time.

    Args:
        logits: float32 of any shape.
        active: bool of the same shape.
    """
    if not active.any():
        return 1.0
    # No comparison holds for NaN, so PowerInfer computes the neuron: it ranks highest.
    scores = torch.nan_to_num(logits, nan=torch.finfo(torch.float32).max).flatten()
    # A label in the last bit of its logit's rank is sorted with it, without an index of either.
    keys = (_ranks(scores.numpy()) << 1) | active.flatten().numpy()
    keys.sort()
    keys = keys[::-1]
    last = np.flatnonzero(np.append(np.diff(keys >> 1), 1))
    hits = np.cumsum(keys & 1)[last]
    precision = hits / (last + 1)
    return float((np.diff(hits, prepend=0) * precision).sum() / hits[-1])


def _ranks(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return integers in the order of finite numbers, the same for equal ones, −0 and 0 too."""
    bits = (values + np.float32(0)).view(np.int32)
    return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64)
