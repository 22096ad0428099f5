"""S2 and S3 on the CPU: right to the last digits, and never a look at an inactive row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from readied import Readied
from torch import Tensor

from sparse_operators import cpu, cpu_bags, reference

BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
SHAPES = [(64, 96), (33, 70), (1, 1), (129, 1031)]
"""d_model and d_ff, odd ones too, the last with more neurons than several groups."""


@pytest.fixture(params=["loops", "bags"])
def path(request: pytest.FixtureRequest) -> ModuleType:
    """The loops of float32, and the bags of the other types, which take float32, too."""
    return cpu if request.param == "loops" else cpu_bags


def draw(d_model: int, d_ff: int, tokens: int, sparsity: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return float32 scores, x and a weight matrix."""
    generator = torch.Generator().manual_seed(d_ff + tokens)
    active = torch.rand(tokens, d_ff, generator=generator) >= sparsity
    size = torch.rand(tokens, d_ff, generator=generator) + 0.01
    x = torch.randn(tokens, d_model, generator=generator)
    weight = torch.randn(d_ff, d_model, generator=generator)
    return torch.where(active, size, -size), x, weight


def distance(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    norm = float(exact.norm())
    return float((found.double() - exact).norm()) / (norm or 1.0)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Hand out new memory full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CASES = [(cpu, dtype) for dtype in BOUNDS] + [(cpu_bags, torch.float32)]


@pytest.mark.parametrize(("path", "dtype"), CASES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.88, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_operators_are_as_right_as_their_type_allows(
    path: ModuleType, shape: tuple[int, int], tokens: int, sparsity: float, dtype: torch.dtype
) -> None:
    scores, x, w = (part.to(dtype) for part in draw(*shape, tokens, sparsity))
    with poisoned_memory():
        x1 = path.up(scores, x, w)
        y = path.down(x1, w)
    assert x1.dtype == y.dtype == dtype
    assert distance(x1, reference.up(scores.double(), x.double(), w.double())) <= BOUNDS[dtype]
    assert distance(y, reference.down(x1.double(), w.double())) <= BOUNDS[dtype]
    if sparsity == 1:
        assert not x1.any()
        assert not y.any()


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_nothing_of_a_row_that_no_token_computes_is_read(path: ModuleType, tokens: int) -> None:
    scores, x, w = draw(48, 300, tokens, 0.9)
    unused = (scores <= 0).all(0)
    assert unused.any()
    poisoned = w.masked_fill(unused[:, None], torch.nan)
    x1 = path.up(scores, x, poisoned)
    assert torch.equal(x1, path.up(scores, x, w))
    assert torch.equal(path.down(x1, poisoned), path.down(x1, w))
    assert x1.isfinite().all()


def test_a_token_reads_no_row_of_another_one(path: ModuleType) -> None:
    scores, x, w = draw(48, 300, 2, 0.5)
    only_second = (scores[0] <= 0) & (scores[1] > 0)
    poisoned = w.masked_fill(only_second[:, None], torch.nan)
    x1 = path.up(scores, x, poisoned)
    assert torch.equal(x1[0], path.up(scores, x, w)[0])
    assert x1[1].isnan().any()


def test_fatrelu_computes_from_its_threshold_on(path: ModuleType) -> None:
    threshold = 0.25
    below = float(torch.nextafter(torch.tensor(threshold), torch.tensor(0.0)))
    scores = torch.tensor([[threshold, below, 0.0, -1.0, 3.0]])
    x, w = torch.ones(1, 4), torch.ones(5, 4)
    x1 = path.up(scores, x, w, threshold=threshold)
    assert x1.tolist() == [[4 * threshold, 0, 0, 0, 12]]
    assert path.down(x1, w).tolist() == [[13.0] * 4]


def test_every_token_has_its_own_threshold_test(path: ModuleType) -> None:
    scores, x, w = draw(48, 300, 4, 0.5)
    x1 = path.up(scores, x, w, threshold=0.6)
    wide = reference.up(scores.double(), x.double(), w.double(), threshold=0.6)
    assert torch.equal(x1 != 0, scores >= 0.6)
    assert distance(x1, wide) <= 1e-6


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_number_of_threads_changes_no_bit(path: ModuleType, tokens: int) -> None:
    scores, x, w = draw(512, 4096, tokens, 0.7)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(path.down(path.up(scores, x, w), w))
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_scores_need_not_be_contiguous(path: ModuleType) -> None:
    scores, x, w = draw(16, 40, 3, 0.5)
    strided = scores.T.contiguous().T
    assert torch.equal(path.up(strided, x, w), path.up(scores, x, w))
    x1 = path.up(strided, x, w)
    assert x1.is_contiguous()
    assert torch.equal(path.down(x1.T.contiguous().T, w), path.down(x1, w))


def test_nan_and_infinity_of_active_rows_are_not_lost(path: ModuleType) -> None:
    scores, x, w = draw(16, 40, 1, 0.0)
    w[3, 5], w[7, 2] = torch.nan, torch.inf
    x1 = path.up(scores, x, w)
    assert x1[0, 3].isnan()
    assert x1[0, 7].isinf()
    y = path.down(torch.ones(1, 40), w)
    assert y[0, 5].isnan()
    assert y[0, 2].isinf()


CHECK = """
import sys, torch
torch.set_num_threads(1)
from sparse_operators import cpu
assert "numba" not in sys.modules
assert cpu.down(torch.ones(1, 8), torch.ones(8, 4)).tolist() == [[8.0] * 4]
import numba
print(torch.get_num_threads(), numba.get_num_threads())
"""


def test_numba_starts_late_and_leaves_pytorch_its_threads(new_python: Readied) -> None:
    done = new_python(CHECK)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 1\n"
