"""How few neurons make how many of the activations."""

from __future__ import annotations

import pytest
import torch

from common.hot_neurons import SHARES, hot_neuron_curve


def test_the_hottest_neurons_come_first() -> None:
    curve = hot_neuron_curve(torch.tensor([[1, 8], [0, 1]]))
    assert curve is not None
    assert len(SHARES) == len(curve) == 101
    assert [curve[at] for at in (0, 25, 50, 75, 100)] == pytest.approx([0, 0.8, 0.9, 1, 1])
    assert [SHARES[at] for at in (0, 25, 100)] == [0, 0.25, 1]


def test_between_whole_neurons_the_curve_is_straight() -> None:
    curve = hot_neuron_curve(torch.tensor([3, 1]))
    assert curve is not None
    assert curve[25] == pytest.approx(0.375)


def test_neurons_that_are_never_active_have_no_curve() -> None:
    assert hot_neuron_curve(torch.zeros(4).long()) is None
