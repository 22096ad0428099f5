"""Metrics of a predictor, by hand on four neurons, and by brute force on more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.decisions import DecisionCounts
from common.element_types import ELEMENT_TYPES
from predictor.module import Predictor, logits_of
from predictor.reporting.metrics import (
    LayerMeasurement,
    average_precision,
    measure_predictor,
    sweep_thresholds,
)
from predictor.stored import LayerPredictor
from predictor.traces.packing import pack_codes
from predictor.traces.rows import LabelledRows, LayerRows, LayerWeights, ShardedRows

FC1 = torch.eye(2)
FC2 = torch.tensor([[1.0, 0], [-1, 1], [0, 1], [-1, -1]])
INPUTS = torch.tensor([[1.0, 0], [0, 4], [9, 9]])
"""Logits of the first two: 1 -1 0 -1 and 0 4 4 -4; the third is not held out."""

IMPORTANCE = torch.tensor([[4.0, 2, 0, 0], [0, 0, 1, 4], [0, 0, 0, 16]])
HELD = torch.tensor([0, 1])
F16 = ELEMENT_TYPES["f16"]


def rows_of(inputs: torch.Tensor, importance: torch.Tensor, bits: int = 4) -> LabelledRows:
    """Make rows whose active neurons are those of positive importance, which are powers of 2.

    With 4 bits code 10 + n under a scale of √2 stands for 2^n.
    """
    active = importance > 0
    counts = active.sum(1)
    codes = (torch.log2(importance[active]) + 10).to(torch.uint8).numpy()
    d_ff = importance.shape[1]
    piece = LayerRows(
        inputs=inputs.half(),
        active=torch.from_numpy(np.packbits(active.numpy(), axis=1, bitorder="little")),
        counts=active.sum(0),
        importance_bits=bits,
        scale=torch.full((len(inputs),), 2**0.5),
        starts=torch.cumsum(counts, 0) - counts,
        importance=torch.from_numpy(pack_codes(codes, 4)),
        file=Path("traces"),
    )
    weights = LayerWeights(torch.zeros(d_ff, inputs.shape[1]), torch.ones(d_ff))
    return LabelledRows(ShardedRows(piece), weights, normalise=False)


def measure(rows: LabelledRows, held: torch.Tensor = HELD, **changes: Any) -> LayerMeasurement:
    predictor = changes.pop("predictor", LayerPredictor(FC1.half(), FC2.half(), None))
    chosen: dict[str, Any] = {"layer": 3, "threshold": 0.0, "ffn_matrices": 3, "seed": 0}
    return measure_predictor(rows, held, predictor, **{"ffn": F16} | chosen | changes)


def test_every_metric_by_hand() -> None:
    found = measure(rows_of(INPUTS, IMPORTANCE))
    assert found.metrics == {
        "activation_sparsity": pytest.approx(1 - 4 / 8),
        "activation_recall": pytest.approx(2 / 4),
        "precision": pytest.approx(2 / 5),
        "predicted_sparsity": pytest.approx(1 - 5 / 8),
        # 2 units are stored as 32: 32 · (2 + 4) of the FFN's 3 · 2 · 4.
        "ffn_bytes_ratio": pytest.approx(32 * 6 / 24 + 5 / 8),
        # At logits 4, 1, -1, -4, where recall grows: 1 of 2, 2 of 3, 3 of 7, 4 of 8 are active.
        "average_precision": pytest.approx((1 / 2 + 2 / 3 + 3 / 7 + 4 / 8) / 4),
        # Skipped: 2 of the first token, 4 of the second; ‖x‖² is 1 and 16.
        "missed_importance": pytest.approx((2 + 4) / 11),
        "ffn_output_error": pytest.approx((2**2 / 1 + 4**2 / 16) / 2),
    }
    assert (found.layer, found.rank) == (3, 2)
    assert found.activation_counts.tolist() == [1, 1, 1, 2]


def test_a_logit_equal_to_the_threshold_is_computed() -> None:
    found = measure(rows_of(INPUTS, IMPORTANCE), threshold=4.0)
    assert found.metrics["predicted_sparsity"] == pytest.approx(1 - 2 / 8)
    assert found.metrics["activation_recall"] == pytest.approx(1 / 4)


def test_a_narrow_and_an_ungated_ffn_change_bytes_alone() -> None:
    rows = rows_of(INPUTS, IMPORTANCE)
    plain = measure(rows).metrics
    # 2 units are stored as 32, each weight in 64 bytes of 18 that one of the FFN takes.
    other = measure(rows, ffn=ELEMENT_TYPES["q4_0"], ffn_matrices=2).metrics
    assert other.pop("ffn_bytes_ratio") == pytest.approx(64 / 18 * 32 * 6 / 16 + 5 / 8)
    plain.pop("ffn_bytes_ratio")
    assert other == plain


def test_without_importance_its_metrics_are_left_out() -> None:
    found = measure(rows_of(INPUTS, IMPORTANCE, bits=0))
    assert "missed_importance" not in found.metrics
    assert "ffn_output_error" not in found.metrics
    assert found.metrics["activation_recall"] == 0.5
    assert found.curve.missed_importance is None
    assert found.curve.ffn_output_error is None


def test_normalised_rows_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        measure(replace(rows_of(INPUTS, IMPORTANCE), normalise=True))


@pytest.fixture
def random() -> tuple[LabelledRows, LayerPredictor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 8, generator=generator)
    importance = torch.exp2(torch.randint(-3, 4, (50, 40), generator=generator).float())
    active = torch.rand(50, 40, generator=generator) < 0.2
    fc1, fc2 = (torch.randn(*s, generator=generator).half() for s in ((4, 8), (40, 4)))
    return rows_of(inputs, importance * active), LayerPredictor(fc1, fc2, None)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, 0.3])
def test_the_sweep_holds_what_each_threshold_decides(
    random: tuple[LabelledRows, LayerPredictor], threshold: float
) -> None:
    rows, predictor = random
    held = torch.arange(0, 50, 2)
    curve = measure(rows, held, predictor=predictor, threshold=threshold).curve
    logits = logits_of(Predictor(predictor.fc1.float(), predictor.fc2.float()), rows.inputs(held))
    active, importance = rows.active(held), rows.importance(held)
    squares = rows.inputs(held).square().sum(1)
    for place in (0, curve.position(threshold), 200, len(curve.thresholds) - 1):
        computed = ~(logits < curve.thresholds[place])
        expected = DecisionCounts()
        expected.add(active, computed)
        assert curve.counts(place) == expected
        missed = importance * ~computed
        assert curve.missed_importance is not None
        assert curve.ffn_output_error is not None
        assert float(curve.missed_importance[place]) == pytest.approx(
            float(missed.sum() / importance.sum())
        )
        assert float(curve.ffn_output_error[place]) == pytest.approx(
            float((missed.square().sum(1) / squares).mean())
        )


def test_a_higher_threshold_never_computes_more_nor_loses_less(
    random: tuple[LabelledRows, LayerPredictor],
) -> None:
    rows, predictor = random
    curve = measure(rows, torch.arange(50), predictor=predictor).curve
    assert (curve.thresholds.diff() > 0).all()
    for falling in (curve.density, curve.recall):
        assert (falling.diff() <= 0).all()
        assert (float(falling[0]), float(falling[-1])) == (1, 0)
    assert curve.missed_importance is not None
    assert curve.ffn_output_error is not None
    assert (curve.missed_importance.diff() >= 0).all()
    assert (curve.ffn_output_error.diff() >= 0).all()
    assert float(curve.missed_importance[-1]) == pytest.approx(1)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, 0.3, -1e30, 7.25])
def test_a_sweep_goes_through_the_threshold_itself(threshold: float) -> None:
    thresholds = sweep_thresholds(threshold)
    assert torch.tensor(threshold) in thresholds
    assert (thresholds.diff() > 0).all()


def test_batches_add_up(random: tuple[LabelledRows, LayerPredictor]) -> None:
    rows, predictor = random
    whole = measure(rows, torch.arange(50), predictor=predictor).metrics
    pieces = measure(rows, torch.arange(50), predictor=predictor, at_once=40 * 7).metrics
    # Average precision is that of a sample of seven rows now.
    assert pieces.pop("average_precision") != pytest.approx(whole.pop("average_precision"))
    assert pieces == pytest.approx(whole)


@pytest.mark.parametrize(("share", "recall"), [(0.0, 1.0), (1.0, 5 / 8)])
def test_layers_of_one_class_have_metrics(share: float, recall: float) -> None:
    found = measure(rows_of(INPUTS, torch.full((3, 4), share))).metrics
    assert found["activation_sparsity"] == 1 - share
    assert found["average_precision"] == 1
    assert found["activation_recall"] == pytest.approx(recall)
    assert found["missed_importance"] == pytest.approx(1 - recall)


def test_a_logit_that_is_no_number_is_computed_and_ranks_highest() -> None:
    logits = torch.tensor([1.0, float("nan"), 2.0, float("-inf")])
    assert average_precision(logits, torch.tensor([False, True, False, False])) == 1
    assert average_precision(logits, torch.tensor([False, False, False, True])) == 0.25


@pytest.mark.parametrize("step", [None, 0.25, 4.0])
def test_average_precision_is_scikit_learns(step: float | None) -> None:
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(31, 100, generator=generator)
    active = torch.rand(logits.shape, generator=generator) < torch.sigmoid(logits - 1)
    if step is not None:  # equal logits, and zeros of both signs
        logits = (logits / step).round() * step
    expected = average_precision_score(active.flatten().numpy(), logits.flatten().numpy())
    assert average_precision(logits, active) == pytest.approx(expected, rel=1e-14)
