"""Predictors of one layer: start, rounding, labels and training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from planted import (
    D_FF,
    D_MODEL,
    HOLDOUT,
    TRAIN,
    importance_loss,
    labels_of,
    normal,
    pairs,
    planted_layer,
    rows_from,
    seeded,
    starting_at,
)

from predictor.collection.recorder import row_importance
from predictor.module import Predictor, decide, to_half
from predictor.traces.packing import decode_importance
from predictor.traces.rows import LabelledRows, LayerWeights, ShardedRows, normalise_rms
from predictor.training.layer import evaluate, train_layer
from predictor.training.settings import DEJAVU, PSP, Recipe
from predictor.training.start import moments_of, random_start, start_sample

RANK = 32


def unweighted(d_ff: int, d_model: int = 8) -> LayerWeights:
    return LayerWeights(torch.zeros(d_ff, d_model), torch.ones(d_ff))


# --- the start -----------------------------------------------------------------------------------


def test_full_pairs_have_the_sign_of_every_gate() -> None:
    gate, inputs = normal(D_FF, D_MODEL), normal(500, D_MODEL, seed=1)
    predictor = pairs(gate, moments_of([inputs]), 2 * D_MODEL)
    assert predictor.fc1.shape == (2 * D_MODEL, D_MODEL)
    assert predictor.fc2.shape == (D_FF, 2 * D_MODEL)
    exact = inputs.double() @ gate.double().T
    clear = exact.abs() > 1e-4
    assert clear.float().mean() > 0.999
    assert torch.equal((predictor(inputs) >= 0)[clear], (exact > 0)[clear])


def test_truncated_pairs_are_optimal() -> None:
    """No linear map of its rank has a smaller E‖(W − A)x‖², with every gate of unit power."""
    mixing = normal(D_MODEL, D_MODEL) * torch.logspace(0, -1, D_MODEL)
    moments = moments_of([normal(4000, D_MODEL, seed=1) @ mixing.T])
    moment = moments.second
    gate, k = normal(D_FF, D_MODEL, seed=2), RANK // 2
    gate = gate / (gate @ moment * gate).sum(1, keepdim=True).sqrt()
    factor = torch.linalg.cholesky(moment.double())

    def error(approximation: torch.Tensor) -> float:
        return float(((gate - approximation).double() @ factor).square().sum())

    # A neuron's scale must not matter: its sign does not depend on it.
    scales = torch.logspace(-2, 2, D_FF)[:, None]
    predictor = pairs(gate * scales, moments, RANK)
    fc1, fc2 = predictor.fc1.detach(), predictor.fc2.detach()
    assert torch.equal(fc1, torch.cat([fc1[:k], -fc1[:k]]))
    assert torch.equal(fc2, torch.cat([fc2[:, :k], -fc2[:, :k]], dim=1))
    ours = error(fc2[:, :k] @ fc1[:k])
    least = torch.linalg.svdvals(gate.double() @ factor)[k:].square().sum()
    assert float(least) * 0.999 <= ours <= float(least) * 1.01
    for seed in range(20):
        down = normal(k, D_MODEL, seed=100 + seed)
        # The best up matrix for a given down matrix, by least squares.
        up = gate @ moment @ down.T @ torch.linalg.inv(down @ moment @ down.T)
        assert ours < error(up @ down)


def test_the_random_start_is_drawn_from_the_generator_within_its_bounds() -> None:
    first, again = (random_start(RANK, D_MODEL, D_FF, seeded(3)) for _ in range(2))
    other = random_start(RANK, D_MODEL, D_FF, seeded(4))
    assert torch.equal(first.fc1, again.fc1)
    assert torch.equal(first.fc2, again.fc2)
    assert not torch.equal(first.fc1, other.fc1)
    for weight, fan_in in ((first.fc1, D_MODEL), (first.fc2, RANK)):
        assert 0.95 * fan_in**-0.5 < float(weight.detach().abs().max()) <= fan_in**-0.5


# --- decisions and rounding ----------------------------------------------------------------------


def test_a_logit_at_the_threshold_is_computed() -> None:
    zero = Predictor(torch.zeros(RANK, D_MODEL), torch.zeros(D_FF, RANK))
    assert decide(zero, normal(3, D_MODEL), 0.0).all()
    assert not decide(zero, normal(3, D_MODEL), 1e-6).any()


@pytest.mark.parametrize("fc1_scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("fc2_scale", [1e-6, 1.0, 1e6])
def test_half_precision_flips_only_logits_within_rounding_of_zero(
    fc1_scale: float, fc2_scale: float
) -> None:
    """Also where weights leave float16's range, evenly or from unit to unit and row to row."""
    units, neurons = 10 ** (3 * normal(RANK, seed=2)), 10 ** (3 * normal(D_FF, seed=3))
    fc1 = normal(RANK, D_MODEL) * units[:, None] * fc1_scale
    fc2 = normal(D_FF, RANK, seed=1) / units * neurons[:, None] * fc2_scale
    inputs = normal(400, D_MODEL, seed=4)
    half = to_half(Predictor(fc1, fc2))
    for weight in (half.fc1, half.fc2):
        assert torch.isfinite(weight).all()
        assert torch.equal(weight, weight.half().float())
    x, a, b = inputs.double(), fc1.double(), fc2.double()
    logits = torch.relu(x @ a.T) @ b.T
    # Every weight moves by at most 2^-11 of itself, so a logit by at most twice that of this.
    bound = (x.abs() @ a.abs().T) @ b.abs().T
    flipped = decide(half, inputs, 0.0) != (logits >= 0)
    assert flipped.float().mean() < 0.005
    assert bool((logits.abs() < 2 * 2**-11 * 1.1 * bound)[flipped].all())


# --- rows, labels, importance --------------------------------------------------------------------


@pytest.fixture(scope="module")
def coded() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ShardedRows]:
    """Return active neurons, importance and inputs of 50 rows, and how they are stored."""
    active = torch.rand(50, 37, generator=seeded()) < 0.4
    active[7] = False
    # A quarter of an octave apart within a row: no two share a code.
    order = torch.stack([torch.randperm(37, generator=seeded(n)) for n in range(50)])
    importance = torch.exp2((order - 25) / 4) * active
    inputs = normal(50, 8)
    return active, importance, inputs, rows_from(active, importance, inputs)


def test_rows_are_gathered_in_any_order(
    coded: tuple[torch.Tensor, torch.Tensor, torch.Tensor, ShardedRows],
) -> None:
    active, importance, inputs, stored = coded
    index = torch.cat([torch.randperm(50, generator=seeded(1)), torch.tensor([3, 3, 7])])
    rows = LabelledRows(stored, unweighted(37), normalise=False)
    assert torch.equal(rows.inputs(index), inputs.half().float()[index])
    assert torch.equal(rows.active(index), active[index])
    assert torch.equal(labels_of(rows, index), active[index])
    # Half a step of the code either way.
    torch.testing.assert_close(rows.importance(index), importance[index], rtol=0.045, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_importance_is_decoded_from_each_rows_own_codes(bits: int) -> None:
    active = torch.rand(40, 29, generator=seeded()) < 0.3
    importance = normal(40, 29, seed=1).abs().exp() * active
    stored = rows_from(active, importance, normal(40, 8), bits)
    rows = LabelledRows(stored, unweighted(29), normalise=False)
    _, codes = row_importance(importance[active], active.nonzero()[:, 0], 40, bits)
    expected = torch.zeros(40, 29)
    expected[active] = decode_importance(codes, bits)
    expected *= importance.sum(1, keepdim=True) / active.sum(1, keepdim=True).clamp_min(1)
    index = torch.randperm(40, generator=seeded(2))
    torch.testing.assert_close(rows.importance(index), expected[index])
    assert len(torch.unique(expected[active])) > 4


@pytest.mark.parametrize("top", [1, 5, 18, 37])
def test_clipped_labels_are_exactly_the_largest(
    coded: tuple[torch.Tensor, torch.Tensor, torch.Tensor, ShardedRows], top: int
) -> None:
    """By |act(g)·u|, so the norms of the down columns are divided out."""
    active, importance, _, stored = coded
    norms = torch.exp2(torch.randint(-3, 4, (37,), generator=seeded(1)) + 0.0)
    weights = LayerWeights(torch.zeros(37, 8), norms)
    rows = LabelledRows(stored, weights, normalise=False, top=top)
    labels = labels_of(rows, torch.arange(50))
    for label, row, values in zip(labels, active, importance / norms, strict=True):
        largest = sorted(row.nonzero()[:, 0].tolist(), key=lambda n: -float(values[n]))[:top]
        kept = label.nonzero()[:, 0].tolist()
        # Different down norms may make two neurons tie.
        assert len(kept) == len(largest)
        assert sorted(values[kept].tolist()) == pytest.approx(sorted(values[largest].tolist()))


def test_clipping_keeps_no_more_labels_than_asked_for_where_magnitudes_tie() -> None:
    """Codes are coarse, so that many neurons of a wide layer share the smallest kept one."""
    active = torch.ones(4, 40, dtype=torch.bool)
    stored = rows_from(active, torch.full((4, 40), 3.0), normal(4, 8))
    rows = LabelledRows(stored, unweighted(40), normalise=False, top=10)
    assert labels_of(rows, torch.arange(4)).sum(1).tolist() == [10] * 4


def test_normalised_inputs_have_unit_root_mean_square(
    coded: tuple[torch.Tensor, torch.Tensor, torch.Tensor, ShardedRows],
) -> None:
    rows = LabelledRows(coded[3], unweighted(37), normalise=True)
    inputs = rows.inputs(torch.arange(50))
    torch.testing.assert_close(inputs.square().mean(1), torch.ones(50))
    torch.testing.assert_close(inputs, normalise_rms(coded[2].half().float()))
    assert torch.equal(normalise_rms(torch.zeros(1, 8)), torch.zeros(1, 8))


# --- training of a layer -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> tuple[ShardedRows, LayerWeights]:
    return planted_layer(mean=1.2)


def trained(
    recipe: Recipe, planted: tuple[ShardedRows, LayerWeights], seed: int = 0, **options: Any
) -> tuple[LabelledRows, Predictor]:
    rows = LabelledRows(*planted, normalise=recipe.normalise)
    generator = seeded(seed)
    start = starting_at(recipe, rows, TRAIN, generator)
    chosen: dict[str, Any] = {"holdout": HOLDOUT, "generator": generator} | options
    return rows, train_layer(start, rows, train=TRAIN, **chosen)


def recall_times_precision(predictor: Predictor, rows: LabelledRows) -> float:
    counts = evaluate(predictor, rows, HOLDOUT)
    metrics = counts.metrics(rank=RANK, d_model=D_MODEL, d_ff=D_FF)
    return metrics["activation_recall"] * metrics["precision"]


def test_the_psp_recipe_beats_its_start(planted: tuple[ShardedRows, LayerWeights]) -> None:
    rows, predictor = trained(replace(PSP, batch=128), planted)
    start = pairs(planted[1].gate, moments_of([rows.inputs(TRAIN)]), RANK)
    assert importance_loss(predictor, rows) < 0.95 * importance_loss(start, rows)


def test_the_dejavu_recipe_beats_its_start(planted: tuple[ShardedRows, LayerWeights]) -> None:
    rows, predictor = trained(replace(DEJAVU, batch=64, epochs=6), planted)
    start = random_start(RANK, D_MODEL, D_FF, seeded())
    assert recall_times_precision(predictor, rows) > 2 * recall_times_precision(start, rows)


@pytest.mark.parametrize("recipe", [PSP, DEJAVU], ids=lambda recipe: recipe.name)
def test_a_seed_fixes_the_result(recipe: Recipe, planted: tuple[ShardedRows, LayerWeights]) -> None:
    short = replace(recipe, batch=256, epochs=2)
    first, again, other = (trained(short, planted, seed)[1] for seed in (5, 5, 6))
    assert torch.equal(first.fc1, again.fc1)
    assert torch.equal(first.fc2, again.fc2)
    assert not torch.equal(first.fc2, other.fc2)


@pytest.mark.parametrize(
    ("changes", "epochs"),
    [
        ({"best_recall": False}, 7),
        ({"stop_recall": 0.0}, 1),
        # Without learning no epoch is better than the first.
        ({"learning_rate": 0.0, "weight_decay": 0.0, "patience": 3}, 1 + 3),
    ],
    ids=["all epochs", "recall reached", "out of patience"],
)
def test_the_published_recipe_stops_by_recall(
    planted: tuple[ShardedRows, LayerWeights], changes: dict[str, Any], epochs: int
) -> None:
    steps: list[int] = []
    recipe = replace(DEJAVU, **({"epochs": 7, "batch": 500} | changes))
    trained(recipe, planted, on_step=steps.append)
    assert steps == [7 * 5] * (epochs * 5)


def test_the_published_recipe_keeps_the_first_epoch_of_the_best_recall(
    planted: tuple[ShardedRows, LayerWeights],
) -> None:
    recipe = replace(DEJAVU, batch=600, learning_rate=0.01, epochs=4, patience=4)
    epochs = [
        trained(replace(recipe, best_recall=False, epochs=number), planted)
        for number in range(1, 5)
    ]
    recalls = [evaluate(predictor, rows, HOLDOUT).hits for rows, predictor in epochs]
    best = recalls.index(max(recalls))
    assert best < 3
    _, chosen = trained(recipe, planted)
    assert torch.equal(chosen.fc1, epochs[best][1].fc1)
    assert torch.equal(chosen.fc2, epochs[best][1].fc2)


def test_the_psp_recipe_starts_at_the_whitened_svd_of_its_training_rows(
    planted: tuple[ShardedRows, LayerWeights],
) -> None:
    rows, predictor = trained(replace(PSP, epochs=1, learning_rate=0.0), planted)
    seen = start_sample(PSP, TRAIN, seeded())[: 32 * D_MODEL]
    start = pairs(planted[1].gate, moments_of([rows.inputs(seen)]), RANK)
    inputs = rows.inputs(HOLDOUT)
    torch.testing.assert_close(predictor(inputs), start(inputs), atol=1e-3, rtol=1e-3)


def test_importance_weights_favour_the_neurons_whose_output_is_large(
    planted: tuple[ShardedRows, LayerWeights],
) -> None:
    half = D_FF // 2
    favour = torch.cat([torch.full((half,), 10.0), torch.ones(D_FF - half)])
    before = LabelledRows(*planted, normalise=False)
    every = torch.arange(3000)
    importance = before.importance(every) * favour
    stored = rows_from(before.active(every), importance, before.inputs(every))
    layer = (stored, planted[1])
    for weighted, low, high in ((True, 0.15, 1.0), (False, -0.05, 0.05)):
        recipe = replace(PSP, batch=200, epochs=4, importance=weighted)
        rows, predictor = trained(recipe, layer)
        active = rows.active(HOLDOUT)
        found = active & decide(predictor, rows.inputs(HOLDOUT), 0.0)
        recall = found.sum(0) / active.sum(0)
        assert low < float(recall[:half].mean() - recall[half:].mean()) < high


def test_training_never_reads_the_holdout(planted: tuple[ShardedRows, LayerWeights]) -> None:
    recipe = replace(PSP, batch=256, epochs=1)
    _, first = trained(recipe, planted)
    (stored,) = planted[0].pieces
    spoilt = stored.inputs.clone()
    spoilt[HOLDOUT] = float("nan")
    _, second = trained(recipe, (ShardedRows(replace(stored, inputs=spoilt)), planted[1]))
    assert torch.equal(first.fc1, second.fc1)
    assert torch.equal(first.fc2, second.fc2)
