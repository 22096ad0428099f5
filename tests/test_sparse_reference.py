"""The plain reference, against the definition written out neuron by neuron."""

from __future__ import annotations

import pytest
import torch

from sparse_operators import reference


def test_relu_computes_positive_scores_only() -> None:
    scores = torch.tensor([[-1.0, -0.0, 0.0, 1e-30, 2.0]])
    assert reference.computes(scores).tolist() == [[False, False, False, True, True]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.01, 0.02, 0.1, 0.3])
def test_fatrelu_computes_ties(dtype: torch.dtype, threshold: float) -> None:
    tie = torch.tensor(threshold, dtype=dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    neighbours = torch.stack([(tie.view(integer) + step).view(dtype) for step in (-1, 0, 1)])
    assert reference.computes(neighbours, threshold).tolist() == [False, True, True]


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_both_steps_are_the_sum_over_the_neurons(threshold: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gate, w1, w2t = (
        torch.randn(rows, 6, generator=generator, dtype=torch.float64) for rows in (3, 9, 9, 9)
    )
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for t in range(3):
        for j in range(9):
            score = float(x[t] @ gate[j])
            if score > 0 and score >= threshold:
                expected[t] += score * float(x[t] @ w1[j]) * w2t[j]
    found = reference.down(reference.up(x @ gate.T, x, w1, threshold=threshold), w2t)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_a_threshold_changes_which_neurons_count() -> None:
    scores = torch.tensor([[0.1, 0.5]])
    x1 = reference.up(scores, torch.ones(1, 2), torch.ones(2, 2), threshold=0.5)
    assert x1.tolist() == [[0.0, 1.0]]


def test_types_are_kept() -> None:
    scores, x, w = (torch.ones(2, 2, dtype=torch.bfloat16) for _ in range(3))
    x1 = reference.up(scores, x, w)
    assert x1.dtype == reference.down(x1, w).dtype == torch.bfloat16
