"""What only a GPU can show: real sizes, races, streams, CUDA graphs, torch.compile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import interpreted
import pytest
import torch
from click.testing import Result
from torch import Tensor

from sparse_operators import reference, sparse_down, sparse_up, sparse_up_down

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not interpreted.HAS_TRITON, reason="triton is not installed"),
]

SIZES = {"7b": (4096, 11008), "13b": (5120, 13824), "odd": (1000, 3001)}


def parts(
    tokens: int, d_model: int, d_ff: int, dtype: torch.dtype, sparsity: float = 0.88
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cuda")

    scores = normal(tokens, d_ff) - NormalDist().inv_cdf(sparsity)
    x = normal(tokens, d_model)
    w1, w2t = (normal(d_ff, d_model) / d_model**0.5 for _ in range(2))
    return scores.to(dtype), x.to(dtype), w1.to(dtype), w2t.to(dtype)


def exact(scores: Tensor, x: Tensor, w1: Tensor, w2t: Tensor) -> Tensor:
    scores, x, w1, w2t = (part.double() for part in (scores, x, w1, w2t))
    return reference.down(reference.up(scores, x, w1), w2t)


def error(found: Tensor, right: Tensor) -> float:
    assert not found.isnan().any()
    return float((found.double() - right).norm() / right.norm())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2), (torch.float32, 1e-5)]
)
@pytest.mark.parametrize("sparsity", [0.1, 0.88, 0.99])
def test_real_sizes(
    size: str, tokens: int, dtype: torch.dtype, bound: float, sparsity: float
) -> None:
    scores, x, w1, w2t = parts(tokens, *SIZES[size], dtype, sparsity)
    unused = ~reference.computes(scores).any(dim=0)
    right = exact(scores, x, w1, w2t)
    w1[unused], w2t[unused] = torch.nan, torch.nan
    x1 = sparse_up(scores, x, w1)
    assert error(sparse_down(x1, w2t), right) <= 2 * bound
    assert error(sparse_up_down(scores, x, w1, w2t), right) <= 2 * bound


@pytest.mark.parametrize("tokens", [1, 4])
def test_bits_repeat_a_thousand_times(tokens: int) -> None:
    scores, x, w1, w2t = parts(tokens, *SIZES["7b"], torch.float16)
    x1 = sparse_up(scores, x, w1)
    first = sparse_down(x1, w2t)
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        differ += (sparse_down(x1, w2t, check=False) != first).sum()
    assert int(differ) == 0


def test_fused_bits_repeat() -> None:
    from sparse_operators.cuda import up_down_fused

    given = parts(1, *SIZES["7b"], torch.float16)
    first = up_down_fused(*given)
    assert error(first, exact(*given)) <= 2e-3
    assert all(torch.equal(first, up_down_fused(*given)) for _ in range(100))


def test_streams_do_not_disturb_each_other() -> None:
    scores, x, w1, w2t = parts(1, *SIZES["7b"], torch.float16)
    x1 = sparse_up(scores, x, w1)
    first = sparse_down(x1, w2t)
    streams = [new_stream() for _ in range(3)]
    torch.cuda.synchronize()
    sums: list[Tensor] = []
    for _ in range(200):
        for stream in streams:
            with torch.cuda.stream(stream):
                sums.append(sparse_down(x1, w2t, check=False))
    torch.cuda.synchronize()
    assert all(torch.equal(first, other) for other in sums)


def new_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def captured(
    function: Callable[..., Tensor], given: tuple[Tensor, ...]
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    stream = new_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = function(*given)
    return graph, y


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_graph_follows_new_scores(tokens: int) -> None:
    given = parts(tokens, *SIZES["7b"], torch.float16)
    graph, y = captured(sparse_up_down, given)
    for sparsity in (0.99, 0.5, 0.88):
        given[0].copy_(parts(tokens, *SIZES["7b"], torch.float16, sparsity)[0])
        graph.replay()
        assert error(y, exact(*given)) <= 2e-3


def test_graphs_may_run_side_by_side() -> None:
    given = parts(1, *SIZES["7b"], torch.float16)
    graphs = [captured(sparse_up_down, given) for _ in range(2)]
    first = sparse_up_down(*given)
    streams = [new_stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(200):
        for (graph, _y), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(first, y) for _, y in graphs)


def test_ops_are_registered_rightly() -> None:
    scores, x, w1, w2t = parts(2, 64, 96, torch.float16)
    torch.library.opcheck(torch.ops.psp.sparse_up.default, (scores, x, w1, 0.3, True))
    torch.library.opcheck(torch.ops.psp.sparse_down.default, (scores, w2t, True))
    torch.library.opcheck(torch.ops.psp.sparse_up_down.default, (scores, x, w1, w2t, 0.3, False))


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # inductor's advice on a card
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # its imports
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # cudagraph_trees.py begins with one
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode: str) -> None:
    scores, x, *weights = parts(1, *SIZES["odd"], torch.float16)
    compiled = torch.compile(sparse_up_down, fullgraph=True, mode=mode)
    for times in (1, 2, -3):  # a graph that was recorded of nothing would repeat the first
        given = scores.roll(times), x * times, *weights
        assert error(compiled(*given), exact(*given)) <= 2e-3


def test_nan_and_devices_are_refused() -> None:
    scores, x, w1, _ = parts(1, 64, 96, torch.float16)
    with pytest.raises(ValueError, match="expected one device"):
        sparse_up(scores, x.cpu(), w1)
    scores[0, 5] = torch.nan
    with pytest.raises(ValueError, match="scores holds 1 NaN"):
        sparse_up(scores, x, w1)


def test_tuning_measures_keeps_and_compares(
    psp: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sparse_operators.cuda import problem_of
    from sparse_operators.triton_launch import read_launches, tuned_launches

    monkeypatch.setenv("PSP_CACHE_DIR", str(tmp_path))
    options = ("--shape", "512,1024", "--sparsity", "0.5,0.9", "--device", "cuda", "--json")
    result = psp("bench-operators", *options, "--tune")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    device = torch.device("cuda", 0)
    given = parts(1, 512, 1024, torch.float16)
    try:
        chosen = read_launches(Path(document["tuning"]["file"]), device)
        for operator in ("up", "down"):
            problem = problem_of(operator, given[0], 512)
            assert tuned_launches(device)[problem] == chosen[problem]
        for row in document["sparsities"]:
            assert all(row["default_seconds"][name] > 0 for name in ("s2", "s3", "ffn"))
        assert error(sparse_up_down(*given), exact(*given)) <= 2e-3
    finally:
        tuned_launches(device).clear()
