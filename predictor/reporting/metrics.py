"""How good a layer's predictor is on held-out documents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from predictor.artifact import LayerPredictor
from predictor.module import Predictor, logits_of
from predictor.reporting.sweep import Curve, Sweep, sweep_thresholds
from predictor.traces.rows import LabelledRows

DECISIONS_AT_ONCE = 2**22
"""Decisions of a batch, and of the sample that average precision is taken on."""


@dataclass(frozen=True, kw_only=True)
class LayerMeasurement:
    """One layer's numbers.

    Attributes:
        layer: number of the layer.
        rank: hidden units of its predictor.
        metrics: see `measure_predictor`.
        curve: the layer under a sweep of the global threshold.
        chosen: position in the curve of the threshold that will be exported.
        activation_counts: (d_ff,) int64, tokens on which each neuron was active.
    """

    layer: int
    rank: int
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
    ffn_matrices: int = 3,
    predictor_width: float = 1.0,
    seed: int = 0,
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
        predictor_width: bytes of a predictor's weight relative to one of the FFN.
        seed: seed of the sample for average precision.
        at_once: decisions of a batch and of that sample.
    """
    # A threshold other than 0 is in units of the residual itself.
    assert not rows.normalise
    net = Predictor(predictor.fc1.float(), predictor.fc2.float())
    batch = sample_rows(rows.d_ff, at_once)
    curve = _sweep(net, rows, torch.split(held, batch), threshold)
    chosen, rank = curve.position(threshold), len(predictor.fc1)
    metrics = curve.counts(chosen).metrics(
        rank=rank,
        d_model=predictor.fc1.shape[1],
        d_ff=rows.d_ff,
        ffn_matrices=ffn_matrices,
        predictor_width=predictor_width,
    )
    metrics["average_precision"] = _sampled_average_precision(net, rows, held, batch, seed)
    for name in ("missed_importance", "ffn_output_error"):
        if (values := getattr(curve, name)) is not None:
            metrics[name] = float(values[chosen])
    counts = rows.rows.counts
    return LayerMeasurement(
        layer=layer,
        rank=rank,
        metrics=metrics,
        curve=curve,
        chosen=chosen,
        activation_counts=counts,
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
    1 where nothing is active, as recall. Source: scikit-learn's `average_precision_score`.

    Args:
        logits: float32 of any shape.
        active: bool of the same shape.
    """
    from sklearn.metrics import average_precision_score

    if not active.any():
        return 1.0
    # No comparison holds for NaN, so PowerInfer computes the neuron: it ranks highest.
    scores = torch.nan_to_num(logits, nan=torch.finfo(torch.float32).max).flatten()
    return float(average_precision_score(active.flatten().numpy(), scores.numpy()))
