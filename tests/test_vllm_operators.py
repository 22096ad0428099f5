"""The plugin's FFN operator: exact either way, its way chosen at every call, neurons counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sparse_operators import cpu_bags
from sparse_operators.reference import rounded_threshold
from vllm_plugin import crossover, operators
from vllm_plugin.crossover import Crossover, Weights, measured_limit
from vllm_plugin.operators import activate, count_active, gated_ffn

D_MODEL, D_FF = 48, 80
ACTIVATIONS = [(0.0, False), (0.2, False), (0.0, True)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

Limit = Callable[[float], Crossover]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Limit]:
    """Pretend that the operators are faster up to a share of active neurons."""

    def pretend(share: float) -> Crossover:
        monkeypatch.setattr(operators, "CROSSOVER", Crossover())
        monkeypatch.setattr(crossover, "measured_limit", lambda layers, tokens: share)
        return operators.CROSSOVER

    return pretend  # type: ignore[return-value]  # pytest undoes it


@pytest.fixture
def all_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "real_tokens", lambda count: torch.ones(count, dtype=torch.bool))


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(2 * D_FF, D_MODEL, generator=generator) / D_MODEL**0.5
    down = torch.randn(D_MODEL, D_FF, generator=generator) / D_FF**0.5
    down = down.to(dtype)
    return Weights(gate_up.to(dtype), down, down.T.contiguous())


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, D_MODEL, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def formula(x: Tensor, w: Weights, threshold: float, double_relu: bool) -> tuple[Tensor, Tensor]:
    """Return output and active neurons in float64, from scores rounded as the type rounds them."""
    scores = torch.nn.functional.linear(x, w.gate).double()
    up = torch.nn.functional.linear(x, w.up).double()
    active = (scores > 0) & (scores >= rounded_threshold(threshold, x.dtype))
    active = active & (up > 0) if double_relu else active
    return (scores * up * active) @ w.rows.double(), active


def run(x: Tensor, w: Weights, counts: Tensor | None, threshold: float, double: bool) -> Tensor:
    y: Tensor = gated_ffn(x, w.gate_up, w.down, w.rows, counts, threshold, double)
    return y


@pytest.mark.usefixtures("all_real")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 30])
@pytest.mark.parametrize(("threshold", "double"), ACTIVATIONS)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_both_ways_are_the_formula(
    limit: Limit, dtype: torch.dtype, tokens: int, threshold: float, double: bool, share: float
) -> None:
    chosen, w, x = limit(share), weights(dtype), inputs(tokens, dtype)
    counts = torch.zeros(D_FF + 1, dtype=torch.int64)
    expected, active = formula(x, w, threshold, double)
    y = run(x, w, counts, threshold, double)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    if dtype == torch.float32:
        assert torch.equal(counts[:-1], active.sum(0))
    assert counts[-1] == tokens
    way = "sparse" if share and tokens <= 8 else "dense"
    assert chosen.taken == {way: 1}


def test_nothing_is_counted_without_a_place_for_it(limit: Limit) -> None:
    limit(1.0)
    expected, _ = formula(inputs(2), weights(), 0.0, False)
    torch.testing.assert_close(run(inputs(2), weights(), None, 0.0, False), expected.float())


def test_the_way_follows_the_share_of_active_neurons(limit: Limit) -> None:
    chosen, w = limit(0.3), weights()
    few, many = inputs(1), inputs(1)
    scores = torch.nn.functional.linear(few, w.gate)
    order = scores.argsort(descending=True)[0]
    shifted = Weights(w.gate_up.clone(), w.down, w.rows)
    shifted.gate_up[:D_FF] *= -scores.sign().T  # none is active ...
    shifted.gate_up[order[:10]] *= -1  # ... but ten
    run(few, shifted, None, 0.0, False)
    assert chosen.taken == {"sparse": 1}
    shifted.gate_up[:D_FF] *= -1  # all but ten
    run(many, shifted, None, 0.0, False)
    assert chosen.taken == {"sparse": 1, "dense": 1}


def test_compiled_code_still_decides_at_every_call(limit: Limit) -> None:
    chosen, w = limit(1.0), weights()

    def model(x: Tensor) -> Tensor:
        return run(x.relu(), w, None, 0.1, False) + 1

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (20, 4, 9, 2):
        x = inputs(tokens)
        torch.testing.assert_close(compiled(x), formula(x.relu(), w, 0.1, False)[0].float() + 1)
    assert chosen.taken == {"dense": 2, "sparse": 2}


@pytest.mark.usefixtures("all_real")
def test_counts_grow_in_compiled_code(limit: Limit) -> None:
    limit(1.0)
    counts, w = torch.zeros(D_FF + 1, dtype=torch.int64), weights()

    def model(x: Tensor) -> Tensor:
        gate_up = torch.nn.functional.linear(x, w.gate_up)
        count_active(gate_up, counts, 0.0, False)
        return run(x, w, counts, 0.0, False) + gate_up.sum()

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (3, 5):
        compiled(inputs(tokens))
    expected = sum(formula(inputs(tokens), w, 0.0, False)[1].sum(0) for tokens in (3, 5))
    assert counts[-1] == 16
    assert torch.equal(counts[:-1], 2 * torch.as_tensor(expected))


@pytest.mark.parametrize(("threshold", "double"), ACTIVATIONS)
def test_padding_and_trial_runs_are_not_counted(
    monkeypatch: pytest.MonkeyPatch, threshold: float, double: bool
) -> None:
    x, w = inputs(5), weights()
    _, active = formula(x, w, threshold, double)
    gate_up = torch.nn.functional.linear(x, w.gate_up)
    counts = torch.zeros(D_FF + 1, dtype=torch.int64)
    monkeypatch.setattr(operators, "real_tokens", lambda count: None)
    count_active(gate_up, counts, threshold, double)
    assert not counts.any()
    real = torch.tensor([True, False, True, True, False])
    monkeypatch.setattr(operators, "real_tokens", lambda count: real)
    count_active(gate_up, counts, threshold, double)
    assert counts[-1] == 3
    assert torch.equal(counts[:-1], active[real].sum(0))


@pytest.mark.usefixtures("all_real")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "step"), [(32, 1), (33, 2), (64, 2), (1000, 32)])
@pytest.mark.parametrize(("threshold", "double"), ACTIVATIONS)
def test_of_many_tokens_an_even_choice_is_counted(
    dtype: torch.dtype, tokens: int, step: int, threshold: float, double: bool
) -> None:
    x, w = inputs(tokens, dtype), weights(dtype)
    threshold = rounded_threshold(threshold, dtype)
    gate_up = torch.nn.functional.linear(x, w.gate_up)
    gate_up[::3, ::5], gate_up[1::3, ::7], gate_up[2::3, ::9] = threshold, 0.0, -0.0
    gate, up = gate_up.chunk(2, -1)
    active = (gate > 0) & (gate >= threshold) & ((up > 0) if double else True)
    counts = torch.zeros(D_FF + 1, dtype=torch.int64)
    for _ in range(3):
        count_active(gate_up, counts, threshold, double)
    assert counts[-1] == 3 * len(x[::step])
    assert torch.equal(counts[:-1], 3 * active[::step].sum(0))


def test_all_of_a_full_step_fit_their_bytes() -> None:
    gate_up = torch.ones(operators.MOST_COUNTED, 2 * D_FF)
    counts = torch.zeros(D_FF + 1, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "real_tokens", lambda count: torch.ones(count, dtype=torch.bool))
        count_active(gate_up, counts, 0.0, True)
    assert set(counts.tolist()) == {operators.MOST_COUNTED}


def test_a_score_at_the_threshold_is_active() -> None:
    gate = torch.tensor([[0.25, torch.nextafter(torch.tensor(0.25), torch.tensor(0.0)), -1.0, 0.5]])
    up = torch.full((1, 4), 2.0)
    assert activate(gate, up, 0.25, False).tolist() == [[0.5, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    # at shares 0.02 and 0.3 of active neurons, and dense
    [
        ((1.0, 3.8, 3.0), 0.22),
        ((1.0, 3.8, 0.5), 0.0),
        ((1.0, 1.2, 9.0), 1.0),
        ((2.0, 1.0, 3.0), 1.0),
    ],
)
def test_the_limit_lies_where_both_take_as_long(
    monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], expected: float
) -> None:
    times = iter(seconds)
    monkeypatch.setattr(crossover, "_seconds", lambda run, layers: next(times))
    assert measured_limit([weights()], 2) == pytest.approx(expected)


@pytest.mark.parametrize("tokens", [1, 8])
def test_measuring_runs_both_ways_on_the_models_weights(
    monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    used: list[Tensor] = []
    original = cpu_bags.up

    def up(scores: Tensor, x: Tensor, w1: Tensor, *, threshold: float) -> Tensor:
        used.append(w1)
        assert len(x) == tokens
        return original(scores, x, w1, threshold=threshold)

    monkeypatch.setattr(cpu_bags, "up", up)
    layers = [weights(seed=seed) for seed in range(3)]
    assert 0 <= measured_limit(layers, tokens) <= 1
    assert {each.data_ptr() for each in used} == {layer.up.data_ptr() for layer in layers}


def test_a_shape_is_measured_once_for_every_number_of_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[tuple[int, int]] = []

    def limit(layers: list[Weights], tokens: int) -> float:
        measured.append((len(layers), tokens))
        return 0.5

    monkeypatch.setattr(crossover, "measured_limit", limit)
    known, layers = Crossover(), [weights(seed=seed) for seed in range(6)]
    assert known.limit(layers[0], 100) == 0.0  # a trial run of many tokens
    for layer in layers:
        known.limit(layer, 100)
    assert [known.limit(layer, 2) for layer in layers] == [0.5] * 6
    assert known.limit(layers[0], 1) == 0.5
    assert known.limit(layers[0], 0) == 0.0
    assert measured == [(4, 2), (4, 1)]


def test_weights_of_a_model_that_is_gone_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def limit(layers: list[Weights], tokens: int) -> float:
        measured.append(len(layers))
        return 0.5

    monkeypatch.setattr(crossover, "measured_limit", limit)
    known, old, new = Crossover(), weights(seed=0), weights(seed=1)
    gone = weakref.ref(old.rows)
    known.limit(old, 100)
    del old
    assert gone() is None
    assert known.limit(new, 1) == 0.5
    assert measured == [1]
