"""Thresholds of neurons: what they lead to, which are chosen, and that a file decides by them."""

from __future__ import annotations

import pytest
import torch
from conftest import refused

from common.decisions import DecisionCounts
from common.errors import PredictorError
from predictor.module import Predictor, logits_of, to_half
from predictor.size import Size
from predictor.stored import LayerPredictor
from predictor.thresholds.choose import Bound, price_for_bytes, price_for_gap
from predictor.thresholds.curves import Curves, factors, mean_positive, reached, trace_curves
from predictor.thresholds.predicted_model import Quality
from predictor.thresholds.price import Layers, Priced, fewest_bytes, least_error, price_bracket
from predictor.thresholds.sizes import best_sizes
from predictor.traces.rows import LabelledRows
from predictor.traces.store import TraceStore

RANK = 64


@pytest.fixture(scope="module")
def layer(ranked_traces: TraceStore) -> tuple[LabelledRows, Predictor]:
    rows = LabelledRows(ranked_traces.layer(1), ranked_traces.weights(1), normalise=True)
    generator = torch.Generator().manual_seed(0)
    gate = rows.weights.gate
    noisy = gate + 0.5 * gate.std() * torch.randn(gate.shape, generator=generator)
    return rows, to_half(
        Predictor(torch.cat([torch.eye(64), -torch.eye(64)]), torch.cat([noisy, -noisy], dim=1))
    )


def test_curves_are_what_counting_at_each_threshold_gives(
    layer: tuple[LabelledRows, Predictor],
) -> None:
    rows, predictor = layer
    index = torch.arange(0, 2000, 3)
    scale = mean_positive(predictor, rows, index)
    curves = trace_curves(predictor, rows, index, scale)
    inputs, active = rows.rows.inputs_at(index), rows.active(index)
    logits = logits_of(predictor, inputs)
    positive = logits.clamp_min(0).sum(0) / (logits > 0).sum(0)
    torch.testing.assert_close(scale, positive)
    squares = rows.importance(index).square() / inputs.square().sum(1, keepdim=True)
    inf = float("inf")
    expected = {0: -inf, 1: -3.5, 11: -0.625, 24: -(2**-4), 25: 2**-7, 42: 1.25 / 8, 64: 7.0}
    assert len(curves.thresholds) == 66
    for step, factor in {**expected, 65: inf}.items():
        threshold = curves.thresholds[step]
        torch.testing.assert_close(threshold, factor * scale)
        computed = logits >= threshold
        torch.testing.assert_close(
            curves.computed[step], computed.float().mean(0), atol=2e-3, rtol=0
        )
        hits = (computed & active).float().mean(0)
        torch.testing.assert_close(curves.hits[step], hits, atol=2e-3, rtol=0)
        missed = (squares * ~computed).mean(0)
        assert (
            float((curves.missed[step] - missed).abs().sum() / missed.sum().clamp_min(1e-9)) < 0.01
        )
    counted = DecisionCounts()
    counted.add(active, logits >= curves.thresholds[51])
    told = curves.counts(torch.full((1012,), 51), counted.active)
    assert told.decisions == counted.decisions
    assert told.predicted == pytest.approx(counted.predicted, rel=1e-3)
    assert told.hits == pytest.approx(counted.hits, rel=1e-3)


def test_a_value_reaches_the_thresholds_that_are_not_above_it() -> None:
    thresholds = factors()
    assert torch.equal(thresholds, thresholds.sort().values)
    edges = torch.cat([thresholds, torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30])])
    ends = torch.tensor([float("-inf"), float("inf")])
    near = [torch.nextafter(edges, end.expand_as(edges)) for end in ends]
    values = torch.cat(
        [edges, *near, torch.randn(1000, generator=torch.Generator().manual_seed(0))]
    )
    values = values[values.isfinite()]
    expected = (thresholds <= values[:, None]).sum(1)
    assert torch.equal(reached(values), expected.int())


def hand_made() -> Curves:
    """Two neurons with a threshold below zero and three above; the second matters more."""
    return Curves(
        thresholds=torch.tensor([[-1.0, -1.0], [1.0, 1.0], [2.0, 2.0], [4.0, 4.0]]),
        computed=torch.tensor([[0.9, 0.8], [0.5, 0.5], [0.2, 0.4], [0.0, 0.1]]),
        hits=torch.tensor([[0.2, 0.4], [0.2, 0.4], [0.1, 0.4], [0.0, 0.1]]),
        missed=torch.tensor([[0.0, 0.0], [0.0, 1e-5], [0.01, 0.1], [0.02, 5.0]]),
        rows=10,
    )


def test_a_price_weighs_missed_output_against_computed_neurons() -> None:
    """Costs at price 0.1, half of each the mean of both neurons."""
    point = hand_made().at(0.1, 1)
    # Own: [.05, .05], [.03, .14], [.02, 5.01]; means .05, .085, 2.515; mixed below.
    assert point.steps.tolist() == [1, 1]
    assert hand_made().at(1e-6, 1).steps.tolist() == [1, 1]
    dear = hand_made().at(100.0, 1)
    assert dear.steps.tolist() == [3, 3]
    assert [dear.density, dear.error] == pytest.approx([0.05, 5.02])
    between = hand_made().at(1.0, 1)
    # Own: [.5, .5], [.21, .5], [.02, 5.1]; means .5, .355, 2.56.
    assert between.steps.tolist() == [2, 2]
    assert between.thresholds.tolist() == [2.0, 2.0]
    assert hand_made().at(100.0, -1).steps.tolist() == [0, 0]


def test_all_thresholds_of_a_model_have_one_sign() -> None:
    layers = Layers({0: hand_made(), 1: hand_made()}, {0: 0.0, 1: 0.0})
    below, above = (layers.at(1e-5, sign) for sign in (-1, 1))
    assert [below.error, below.ffn_bytes_ratio] == pytest.approx([0.0, 0.85])
    assert [above.error, above.ffn_bytes_ratio] == pytest.approx([2e-5, 0.5])
    for priced in (below, above):
        for point in priced.points.values():
            assert ((point.thresholds > 0) == (priced.sign > 0)).all()


@pytest.mark.parametrize(
    ("ffn_bytes", "sign", "reached"),
    [(0.9, -1, 0.85), (0.84, 1, 0.5), (0.5, 1, 0.5), (0.31, 1, 0.3), (0.01, 1, 0.05)],
)
def test_bytes_are_spent_with_the_sign_that_misses_less(
    ffn_bytes: float, sign: int, reached: float
) -> None:
    """The last is out of reach, and what comes nearest is returned."""
    found = least_error(Layers({0: hand_made()}, {0: 0.0}), ffn_bytes)
    assert found.sign == sign
    assert found.ffn_bytes_ratio == pytest.approx(reached)


@pytest.mark.parametrize(
    ("error", "sign", "reached"),
    [(0.0, -1, 0.85), (9e-6, -1, 0.85), (1.1e-5, 1, 0.5), (0.12, 1, 0.3), (9.0, 1, 0.05)],
)
def test_an_error_is_kept_with_the_sign_that_takes_fewer_bytes(
    error: float, sign: int, reached: float
) -> None:
    found = fewest_bytes(Layers({0: hand_made()}, {0: 0.0}), error)
    assert found.error <= error
    assert [found.sign, found.ffn_bytes_ratio] == pytest.approx([sign, reached])


def test_higher_prices_compute_less_and_miss_more(layer: tuple[LabelledRows, Predictor]) -> None:
    rows, predictor = layer
    index = torch.arange(2000)
    curves = trace_curves(predictor, rows, index, mean_positive(predictor, rows, index))
    prices = (1e-7, 1e-6, 1e-4, 1e-3, 1e-2, 1.0)
    points = [Layers({0: curves}, {0: 0.0}).at(price, 1).points[0] for price in prices]
    densities = [point.density for point in points]
    errors = [point.error for point in points]
    assert densities == sorted(densities, reverse=True)
    assert errors == sorted(errors)
    assert densities[0] > 2 * densities[-2] > 0


def test_folded_thresholds_decide_as_the_thresholds_do(
    layer: tuple[LabelledRows, Predictor],
) -> None:
    rows, predictor = layer
    index = torch.arange(500)
    scale = mean_positive(predictor, rows, index)
    logits = logits_of(predictor, rows.rows.inputs_at(index))
    # fc2 is rounded to float16 once more, each product by 2^-11 at most.
    hidden = torch.relu(rows.rows.inputs_at(index) @ predictor.fc1.T)
    for sign in (1, -1):
        thresholds = sign * scale * torch.linspace(0.01, 3, 1012)
        apart = (logits - thresholds).abs() > 2**-10 * (hidden @ predictor.fc2.abs().T)
        assert apart.float().mean() > 0.99
        stored = LayerPredictor(predictor.fc1.half(), predictor.fc2.half(), None)
        scaled = stored.folded(thresholds).predictor()
        found = logits_of(scaled, rows.rows.inputs_at(index)) >= sign
        assert torch.equal(found[apart], (logits >= thresholds)[apart])
        infinite = torch.full((1012,), sign * torch.inf)
        ends = stored.folded(infinite).predictor()
        assert ((logits_of(ends, rows.rows.inputs_at(index)) >= sign) == (sign < 0)).all()


def quality(error: float) -> Quality:
    return Quality(ppl_dense=10.0, ppl_sparse=9.9, kl_divergence=0.3 * error, standard_error=0.01)


@pytest.mark.parametrize(("power", "excess"), [(1.0, 1.0), (0.5, 4.0)])
def test_the_search_ends_just_within_the_bound(
    layer: tuple[LabelledRows, Predictor], power: float, excess: float
) -> None:
    """The divergence may be another power of the error than the first, as for FATReLU models."""
    rows, predictor = layer
    index = torch.arange(2000)
    curves = {0: trace_curves(predictor, rows, index, mean_positive(predictor, rows, index))}
    calls: list[float] = []

    def measure(priced: Priced) -> Quality:
        calls.append(priced.error)
        return quality(excess * reach ** (1 - power) * priced.error**power)

    reach = Layers(curves, {0: 0.1}).at(1e-3, 1).error
    bound = 0.3 * reach
    found, points = price_for_gap(Layers(curves, {0: 0.1}), bound, measure)
    chosen = [point for point in points if point.chosen]
    assert [point.price for point in chosen] == [found.price]
    divergence = chosen[0].kl_divergence
    assert divergence is not None
    assert 0.7 * bound < divergence <= bound
    assert len(calls) == len(points) <= 5
    density = found.points[0].density
    assert chosen[0].ffn_bytes_ratio == found.ffn_bytes_ratio == pytest.approx(0.1 + density)
    with refused(PredictorError, "--max-ppl-gap", "out of reach", "raise --rank"):
        price_for_gap(Layers(curves, {0: 0.1}), bound, lambda priced: quality(10 * bound))


def test_at_the_ends_of_price_all_neurons_or_none_are_computed(
    layer: tuple[LabelledRows, Predictor],
) -> None:
    rows, predictor = layer
    index = torch.arange(2000)
    curves = trace_curves(predictor, rows, index, mean_positive(predictor, rows, index))
    free, dear = curves.at(0.0, -1), curves.at(1e9, 1)
    assert (free.thresholds == -torch.inf).all()
    assert (free.density, free.error) == (1, 0)
    assert dear.density < 1e-9
    assert dear.error == pytest.approx(float(rows.contributions(index)[1].sum()) / 2000, rel=1e-4)


def test_bytes_are_met_from_below(layer: tuple[LabelledRows, Predictor]) -> None:
    rows, predictor = layer
    index = torch.arange(2000)
    curves = {0: trace_curves(predictor, rows, index, mean_positive(predictor, rows, index))}
    found, points = price_for_bytes(Layers(curves, {0: 0.05}), 0.25)
    assert 0.24 < found.ffn_bytes_ratio <= 0.25
    assert points[0].ffn_bytes_ratio == found.ffn_bytes_ratio
    with refused(PredictorError, "--ffn-bytes", "out of reach", "lower --rank"):
        price_for_bytes(Layers(curves, {0: 0.05}), 0.04)


def test_prices_are_bracketed_where_a_condition_ends() -> None:
    last, first = price_bracket(lambda price: price < 3e-5)
    assert last < 3e-5 <= first < last * (1 + 1e-9)
    assert price_bracket(lambda price: False)[0] == pytest.approx(1e-12)
    assert price_bracket(lambda price: True)[1] == pytest.approx(1e3)


def test_a_rank_pays_where_it_saves_more_than_it_costs() -> None:
    """In layer 0 the larger rank halves what is computed, in layer 1 it changes nothing."""
    low, small, large = hand_made(), Size("f16", 32), Size("f16", 64)
    better = Curves(low.thresholds, low.computed / 8, low.hits, low.missed, low.rows)
    scouts = {0: {small: low, large: better}, 1: {small: low, large: low}}

    def cheap(size: Size) -> float:
        return size.rank / 640

    def dear(size: Size) -> float:
        return size.rank / 32

    for bound in (Bound(max_ppl_gap=1e-9), Bound(ffn_bytes=0.6)):
        assert best_sizes(scouts, cheap, 2, bound.leaves_room()) == {0: large, 1: small}
    room = Bound(max_ppl_gap=1e-9).leaves_room()
    assert best_sizes(scouts, dear, 2, room) == {0: small, 1: small}
    # In VRAM, where it costs a tenth, the same rank pays again.
    assert best_sizes(scouts, dear, 2, room, 0.05) == {0: large, 1: small}


def test_a_rank_between_two_is_judged_by_both() -> None:
    """What is computed falls evenly with the rank's logarithm, bytes rise with the rank."""
    low = hand_made()
    shares = {64: 1.0, 128: 0.5}
    scouts = {
        rank: Curves(low.thresholds, low.computed * share, low.hits, low.missed, low.rows)
        for rank, share in shares.items()
    }
    # From 64 to 96 saves 0.29 of the density, from 96 to 128 another 0.21.
    price = 0.25 * low.at(1e-12, -1).density / 32

    def found(kind: str) -> Size:
        curves = {Size(kind, rank): curve for rank, curve in scouts.items()}
        room = Bound(max_ppl_gap=1e-9).leaves_room()
        return best_sizes({0: curves}, lambda size: price * size.rank, 2, room)[0]

    assert found("f16") == Size("f16", 96)
    assert found("q4_0").rank in shares, "Q4_0 has no rank of 96"


def test_the_cheaper_type_is_taken_where_both_do_the_same() -> None:
    low, costs = hand_made(), {"f16": 0.2, "q4_0": 0.05}
    room = Bound(max_ppl_gap=1e-9).leaves_room()

    def found(of_q4_0: Curves, share: float) -> str:
        scouts = {0: {Size("f16", 64): low, Size("q4_0", 64): of_q4_0}}
        return best_sizes(scouts, lambda size: costs[size.kind] * share, 2, room)[0].kind

    assert found(low, 1.0) == "q4_0"
    worse = Curves(low.thresholds, low.computed * 2, low.hits, low.missed, low.rows)
    assert found(worse, 0.01) == "f16"


def test_a_measured_growth_that_contradicts_the_expected_one_counts(
    layer: tuple[LabelledRows, Predictor],
) -> None:
    rows, predictor = layer
    index = torch.arange(2000)
    curves = {0: trace_curves(predictor, rows, index, mean_positive(predictor, rows, index))}
    bound = 0.3 * Layers(curves, {0: 0.1}).at(1e-3, 1).error

    def search(excess: float) -> float:
        def measure(priced: Priced) -> Quality:
            expected = 0.3 * priced.error
            return Quality(
                ppl_dense=1.0,
                ppl_sparse=float(torch.tensor(expected + excess * 0.1 * bound).exp()),
                kl_divergence=expected,
                standard_error=0.1 * bound,
            )

        return price_for_gap(Layers(curves, {0: 0.1}), bound, measure)[0].price

    # One standard error above is scatter, five are not.
    assert search(1.0) == search(0.0)
    assert search(5.0) < 0.9 * search(0.0)
