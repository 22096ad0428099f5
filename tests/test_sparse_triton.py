"""The Triton kernels against float64: interpreted everywhere, on the card where there is one.

Every buffer that a kernel does not write is NaN, and so is every weight row that it may not read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import interpreted
import pytest
import torch
from torch import Tensor

from sparse_operators import reference

pytestmark = pytest.mark.skipif(not interpreted.HAS_TRITON, reason="triton is not installed")

Call = Callable[..., Any]

BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 1e-6}
SHAPES = [(1, 100, 37), (1, 64, 200), (5, 33, 70), (8, 130, 40), (1, 1, 1), (3, 1, 1)]


@pytest.fixture(scope="module")
def interpreter() -> Call:
    if not interpreted.NEW_TRITON:
        pytest.skip("the interpreter needs triton 3.7 or newer")
    return interpreted.start()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> Call:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return interpreted.Cuda()
    found: Call = request.getfixturevalue("interpreter")
    return found


def ffn_inputs(
    tokens: int, d_model: int, d_ff: int, dtype: torch.dtype, sparsity: float = 0.8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 7919 + d_model * 31 + d_ff)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    scores = torch.where(torch.rand(tokens, d_ff, generator=generator) < sparsity, -1.0, 1.0)
    scores *= normal(tokens, d_ff).abs() + 0.01
    parts = (scores, normal(tokens, d_model), normal(d_ff, d_model), normal(d_ff, d_model))
    scores, x, w1, w2t = (part.to(dtype) for part in parts)
    return scores, x, w1, w2t


def poisoned(weight: Tensor, used: Tensor) -> Tensor:
    """The weight with NaN in every row that no token uses."""
    return torch.where(used.any(dim=0)[:, None], weight, torch.nan)


def error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    assert not found.isnan().any()
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("tokens", "d_model", "d_ff"), SHAPES)
def test_up_equals_float64(
    kernels: Call, dtype: torch.dtype, tokens: int, d_model: int, d_ff: int
) -> None:
    scores, x, w1, _ = ffn_inputs(tokens, d_model, d_ff, dtype)
    used = reference.computes(scores)
    x1 = kernels("up", scores, x, poisoned(w1, used))
    assert x1.dtype == dtype
    assert error(x1, reference.up(*doubles(scores, x, w1))) <= BOUNDS[dtype]
    assert (x1[~used] == 0).all()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("tokens", "d_model", "d_ff"), SHAPES)
def test_down_equals_float64(
    kernels: Call, dtype: torch.dtype, tokens: int, d_model: int, d_ff: int
) -> None:
    scores, _, _, w2t = ffn_inputs(tokens, d_model, d_ff, dtype)
    x1 = scores.relu()
    y = kernels("down", x1, poisoned(w2t, x1 != 0))
    assert y.dtype == dtype
    assert error(y, reference.down(*doubles(x1, w2t))) <= BOUNDS[dtype]


UPS = [
    {"programs": 5, "group": 4, "columns": 0, "warps": 1, "stages": 1},
    {"programs": 5, "group": 4, "columns": 0, "warps": 1, "stages": 2},
]
DOWNS = [
    {"programs": 1, "group": 3, "columns": 32, "warps": 1, "form": "slots"},
    {"programs": 1, "group": 8, "columns": 32, "warps": 2, "form": "slots"},
    {"programs": 1, "group": 64, "columns": 32, "warps": 1, "form": "listed"},
    {"programs": 1, "group": 256, "columns": 32, "warps": 4, "form": "listed"},
    {"programs": 3, "group": 16, "columns": 64, "warps": 1, "form": "tiles"},
    {"programs": 8, "group": 64, "columns": 128, "warps": 2, "form": "tiles"},
]
"""Ways that tuning may choose; 1 warp lists or keeps 1,024 rows at a time."""


def interpreted_dense(kernels: Call, sparsity: float) -> bool:
    return sparsity == 0 and not isinstance(kernels, interpreted.Cuda)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("cut", UPS, ids=str)
def test_every_way_up(
    kernels: Call, dtype: torch.dtype, sparsity: float, cut: dict[str, Any]
) -> None:
    # Shares of 3 more than whole groups and of 1 more, which 133 rows give the interpreter sooner.
    d_ff = 133 if interpreted_dense(kernels, sparsity) else 333
    scores, x, w1, _ = ffn_inputs(1, 160, d_ff, dtype, sparsity)
    used = reference.computes(scores)
    x1 = kernels("up_as", scores, x, poisoned(w1, used), cut, module="interpreted")
    assert error(x1, reference.up(*doubles(scores, x, w1))) <= BOUNDS[dtype]
    assert (x1[~used] == 0).all()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("cut", DOWNS, ids=str)
def test_every_way_down(
    kernels: Call, dtype: torch.dtype, sparsity: float, cut: dict[str, Any]
) -> None:
    # All of 2,500 rows take the interpreter 3 to 7 s; the second 1,024 begin within 1,100. Columns
    # are of a whole block and 4 of the next: blocks know nothing of one another.
    d_ff = 1100 if interpreted_dense(kernels, sparsity) else 2500
    scores, _, _, w2t = ffn_inputs(1, cut["columns"] + 4, d_ff, dtype, sparsity)
    x1 = scores.relu()
    y = kernels("down_as", x1, poisoned(w2t, x1 != 0), cut, module="interpreted")
    assert error(y, reference.down(*doubles(x1, w2t))) <= 2 * BOUNDS[dtype]


@pytest.mark.parametrize("cut", DOWNS, ids=str)
@pytest.mark.parametrize("first", [0, 2300])
def test_neighbours_that_are_active_together(
    kernels: Call, first: int, cut: dict[str, Any]
) -> None:
    # A slot or a thread has all of its rows in one cluster, and no other word of them any.
    x1, (_, _, _, w2t) = torch.zeros(1, 2500), ffn_inputs(1, 40, 2500, torch.float32)
    x1[0, first : first + 200] = torch.arange(1.0, 201.0)
    y = kernels("down_as", x1, poisoned(w2t, x1 != 0), cut, module="interpreted")
    assert error(y, reference.down(*doubles(x1, w2t))) <= BOUNDS[torch.float32]


BOTH = [("up_down", 1, 100, 37), ("up_down", 5, 33, 70)]
BOTH += [("up_down_fused", *shape) for shape in SHAPES if shape[0] == 1]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("name", "tokens", "d_model", "d_ff"), BOTH)
def test_up_down_equals_float64(
    kernels: Call, dtype: torch.dtype, name: str, tokens: int, d_model: int, d_ff: int
) -> None:
    scores, x, w1, w2t = ffn_inputs(tokens, d_model, d_ff, dtype)
    used = reference.computes(scores)
    weights = (poisoned(w1, used), poisoned(w2t, used))
    y = kernels(name, scores, x, *weights)
    x1 = reference.up(*doubles(scores, x, w1)).to(dtype)
    assert error(y, reference.down(*doubles(x1, w2t))) <= 2 * BOUNDS[dtype]


@pytest.mark.parametrize("name", ["up_down", "up_down_fused"])
@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_none_and_all_active(kernels: Call, name: str, sparsity: float) -> None:
    scores, x, w1, w2t = ffn_inputs(1, 48, 80, torch.float32, sparsity)
    used = reference.computes(scores)
    assert bool(used.all() if sparsity == 0 else not used.any())
    y = kernels(name, scores, x, poisoned(w1, used), poisoned(w2t, used))
    exact = reference.down(reference.up(*doubles(scores, x, w1)), w2t.double())
    assert error(y, exact) <= BOUNDS[torch.float32]


def test_zero_scores_are_inactive(kernels: Call) -> None:
    _, x, w1, w2t = ffn_inputs(2, 20, 40, torch.float16)
    for zero in (0.0, -0.0):
        scores = torch.full((2, 40), zero, dtype=torch.float16)
        y = kernels("up_down", scores, x, torch.full_like(w1, torch.nan), w2t)
        assert (y == 0).all()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("threshold", [0.3, 0.9], ids=["rounded up", "rounded down"])
def test_a_score_equal_to_the_threshold_is_computed(
    kernels: Call, dtype: torch.dtype, tokens: int, threshold: float
) -> None:
    scores, x, w1, w2t = ffn_inputs(tokens, 24, 40, dtype, sparsity=0.3)
    tie = torch.tensor(threshold, dtype=dtype)
    below = (tie.view(torch.int32 if dtype == torch.float32 else torch.int16) - 1).view(dtype)
    scores[:, 5], scores[:, 7] = tie, below
    used = reference.computes(scores, threshold)
    assert used[:, 5].all()
    assert not used[:, 7].any()
    x1 = kernels("up", scores, x, poisoned(w1, used), threshold=threshold)
    assert error(x1, reference.up(*doubles(scores, x, w1)).where(used, 0.0)) <= BOUNDS[dtype]
    if tokens == 1:
        weights = (poisoned(w1, used), poisoned(w2t, used))
        y = kernels("up_down_fused", scores, x, *weights, threshold=threshold)
        assert error(y, reference.down(*doubles(x1, w2t))) <= 2 * BOUNDS[dtype]


@pytest.mark.parametrize("tokens", [1, 4])
def test_clustered_rows(kernels: Call, tokens: int) -> None:
    scores, x, w1, w2t = ffn_inputs(tokens, 32, 200, torch.float32, sparsity=1.0)
    scores[:, 70:130] *= -1
    used = reference.computes(scores)
    y = kernels("up_down", scores, x, poisoned(w1, used), poisoned(w2t, used))
    exact = reference.down(reference.up(*doubles(scores, x, w1)), w2t.double())
    assert error(y, exact) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("tokens", [1, 3])
def test_an_infinite_product_is_not_hidden(kernels: Call, tokens: int) -> None:
    scores, x, w1, w2t = ffn_inputs(tokens, 16, 20, torch.float32, sparsity=0.0)
    w2t[3] = torch.inf
    x1 = kernels("up", scores, x, w1)
    y = kernels("down", x1, w2t)
    assert not y.isfinite().any()


@pytest.mark.parametrize("name", ["up_down", "up_down_fused"])
def test_x1_is_rounded_even_if_it_is_not_stored(kernels: Call, name: str) -> None:
    # 1 + 2⁻¹² is 1 in float16, so that the first two neurons cancel; the third's x1 is 0.
    scores = torch.tensor([[1.0, 1.0, 6e-8]], dtype=torch.float16)
    x = torch.tensor([[1.0, 2.0**-12]], dtype=torch.float16)
    w1 = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.1, 0.1]], dtype=torch.float16)
    w2t = torch.tensor([[1.0, 2.0], [1.0, 2.0], [torch.nan] * 2], dtype=torch.float16)
    assert kernels(name, scores, x, w1, w2t).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("name", ["up_down", "up_down_fused"])
def test_bits_repeat(kernels: Call, name: str) -> None:
    parts = ffn_inputs(1, 100, 120, torch.float16, sparsity=0.2)
    assert torch.equal(kernels(name, *parts), kernels(name, *parts))


def test_the_sum_does_not_depend_on_who_arrives_last(interpreter: Call) -> None:
    # In float32, (1e8 + 1) - 1e8 is 0 and (1e8 - 1e8) + 1 is 1, so another order would show.
    x1 = torch.zeros(1, 48)
    x1[0, [0, 16, 32]] = torch.tensor([1e8, 1.0, -1e8])
    w2t = torch.ones(48, 16)
    sums = [
        interpreter("down_in_order", x1, w2t, order, module="interpreted")
        for order in itertools.permutations(range(3))
    ]
    assert all(torch.equal(sums[0], other) for other in sums[1:])


@pytest.mark.parametrize("tokens", [1, 3])
def test_counters_are_left_at_zero(interpreter: Call, tokens: int) -> None:
    x1, _, _, w2t = ffn_inputs(tokens, 40, 100, torch.float32)
    first, second, counters = interpreter("down_twice", x1, w2t, module="interpreted")
    assert error(first, reference.down(*doubles(x1, w2t))) <= BOUNDS[torch.float32]
    assert torch.equal(first, second)
    assert (counters == 0).all()
