"""Metrics of decisions against values worked out by hand."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from common.decisions import DecisionCounts, mean_metrics

SIZES = {"rank": 32, "d_model": 64, "d_ff": 128}
# 32 · (64 + 128) weights of a predictor, against 3 · 64 · 128 of the FFN.
PREDICTOR_SHARE = 6144 / 24576


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[cell == "1" for cell in row] for row in rows])


def counted(active: torch.Tensor, predicted: torch.Tensor) -> DecisionCounts:
    counts = DecisionCounts()
    counts.add(active, predicted)
    return counts


def test_metrics_of_a_case_worked_out_by_hand() -> None:
    counts = counted(mask("1100", "0100"), mask("1010", "0101"))
    assert counts == DecisionCounts(decisions=8, active=3, predicted=4, hits=2)
    assert counts.metrics(**SIZES) == {
        "activation_sparsity": pytest.approx(5 / 8),
        "activation_recall": pytest.approx(2 / 3),
        "precision": pytest.approx(2 / 4),
        "predicted_sparsity": pytest.approx(4 / 8),
        "ffn_bytes_ratio": pytest.approx(0.25 + 0.5),
    }


def test_recall_and_precision_are_pooled_over_tokens_not_averaged() -> None:
    """Token 1: 1 of 1 found, 1 of 4 right. Token 2: 0 of 3 found, 0 of 1 right."""
    metrics = counted(mask("1000", "1110"), mask("1111", "0001")).metrics(**SIZES)
    assert metrics["activation_recall"] == pytest.approx(1 / 4)
    assert metrics["precision"] == pytest.approx(1 / 5)


def test_batches_add_up_to_one_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(50, 24, generator=generator) < 0.2
    predicted = torch.rand(50, 24, generator=generator) < 0.4
    parts = DecisionCounts()
    for start in (0, 7, 14, 21, 28, 35, 42, 49):
        parts.add(active[start : start + 7], predicted[start : start + 7])
    assert parts == counted(active, predicted)
    assert parts.decisions == 50 * 24


def test_a_perfect_predictor_has_recall_and_precision_one() -> None:
    active = mask("1001", "0100")
    metrics = counted(active, active).metrics(**SIZES)
    assert metrics["activation_recall"] == metrics["precision"] == 1
    assert metrics["predicted_sparsity"] == metrics["activation_sparsity"] == 5 / 8


def test_where_nothing_is_active_nothing_can_be_missed() -> None:
    metrics = counted(mask("0000"), mask("1000")).metrics(**SIZES)
    assert metrics["activation_sparsity"] == 1
    assert metrics["activation_recall"] == 1
    assert metrics["precision"] == 0


def test_where_nothing_is_predicted_only_the_predictor_is_read() -> None:
    metrics = counted(mask("1000"), mask("0000")).metrics(**SIZES)
    assert metrics["precision"] == 1
    assert metrics["activation_recall"] == 0
    assert metrics["predicted_sparsity"] == 1
    assert metrics["ffn_bytes_ratio"] == pytest.approx(PREDICTOR_SHARE)


def test_predicting_every_neuron_reads_more_than_dense() -> None:
    metrics = counted(mask("1000"), mask("1111")).metrics(**SIZES)
    assert metrics["activation_recall"] == 1
    assert metrics["predicted_sparsity"] == 0
    assert metrics["ffn_bytes_ratio"] == pytest.approx(1 + PREDICTOR_SHARE)


@pytest.mark.parametrize("rank", [32, 64, 1024])
def test_the_predictors_bytes_grow_with_its_rank(rank: int) -> None:
    counts = counted(mask("1000"), mask("0000"))
    metrics = counts.metrics(rank=rank, d_model=64, d_ff=128)
    assert metrics["ffn_bytes_ratio"] == pytest.approx(PREDICTOR_SHARE * rank / 32)


def test_the_mean_over_layers_is_arithmetic_for_every_metric() -> None:
    layers = [
        {"activation_recall": 0.5, "precision": 1.0},
        {"activation_recall": 0.9, "precision": 0.4},
        {"activation_recall": 1.0, "precision": 0.1},
    ]
    assert mean_metrics(layers) == {
        "activation_recall": pytest.approx(0.8),
        "precision": pytest.approx(0.5),
    }
    assert mean_metrics(layers[:1]) == layers[0]


def test_means_do_not_depend_on_which_layer_was_ready_first() -> None:
    layers = [{"recall": value} for value in (0.1, 0.2, 0.3, 0.7)]
    values = {mean_metrics(list(each))["recall"] for each in permutations(layers)}
    assert values == {0.325}
