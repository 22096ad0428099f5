"""The custom ops: dispatch, fake kernels, torch.compile, CUDA graphs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from readied import Readied
from torch import Tensor

from sparse_operators import reference, sparse_down, sparse_up, sparse_up_down

TOKENS = [1, 3, 8]


def parts(tokens: int, device: str = "cpu", d_model: int = 24, d_ff: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    sizes = ((tokens, d_ff), (tokens, d_model), (d_ff, d_model), (d_ff, d_model))
    return [torch.randn(*size, generator=generator).to(device) for size in sizes]


def ffn(scores: Tensor, x: Tensor, w1: Tensor, w2t: Tensor) -> Tensor:
    """All three operators, among operators of PyTorch's own."""
    x1 = sparse_up(scores, x * 2, w1, threshold=0.3)
    return sparse_down(x1, w2t) + sparse_up_down(scores, x, w1, w2t, threshold=0.3).sin()


def exact(scores: Tensor, x: Tensor, w1: Tensor, w2t: Tensor) -> Tensor:
    scores, x, w1, w2t = (part.double() for part in (scores, x, w1, w2t))
    x1 = reference.up(scores, x, w1, threshold=0.3)
    return reference.down(2 * x1, w2t) + reference.down(x1, w2t).sin()


@pytest.mark.parametrize("tokens", TOKENS)
def test_operators_equal_the_reference(tokens: int) -> None:
    given = parts(tokens)
    torch.testing.assert_close(ffn(*given).double(), exact(*given), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_fused_operator_equals_both_steps(tokens: int, deterministic: bool) -> None:
    scores, x, w1, w2t = parts(tokens)
    y = sparse_up_down(scores, x, w1, w2t, threshold=0.3, deterministic=deterministic)
    x1 = sparse_up(scores, x, w1, threshold=0.3)
    chain = sparse_down(x1, w2t, deterministic=deterministic)
    torch.testing.assert_close(y, chain, rtol=1e-5, atol=1e-5)


def test_ops_are_registered_rightly() -> None:
    scores, x, w1, w2t = parts(tokens=3)
    torch.library.opcheck(torch.ops.psp.sparse_up.default, (scores, x, w1, 0.3, True))
    torch.library.opcheck(torch.ops.psp.sparse_down.default, (scores, w2t, True))
    torch.library.opcheck(torch.ops.psp.sparse_up_down.default, (scores, x, w1, w2t, 0.3, False))


@pytest.mark.parametrize(("tokens", "dynamic"), [(1, False), (3, True), (8, False)])
def test_compile_keeps_the_ops_whole(tokens: int, dynamic: bool) -> None:
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    given = parts(tokens)
    compiled = torch.compile(ffn, fullgraph=True, dynamic=dynamic, backend=backend)
    assert torch.equal(compiled(*given), ffn(*given))
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("psp.sparse" in name for name in called) == 3
    assert len(graphs) == 1


def test_compile_takes_another_threshold() -> None:
    torch.compiler.reset()
    scores, x, w1, _ = parts(2)
    compiled = torch.compile(
        lambda threshold: sparse_up(scores, x, w1, threshold=threshold),
        fullgraph=True,
        backend="aot_eager",
    )
    for threshold in (0.1, 0.5, 0.9, 0.0):
        assert torch.equal(compiled(threshold), sparse_up(scores, x, w1, threshold=threshold))


def test_compile_traces_through_autograd() -> None:
    torch.compiler.reset()
    given = parts(2)
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*given), ffn(*given))


def test_there_is_no_gradient() -> None:
    scores, x, w1, _ = parts(1)
    x1 = sparse_up(scores, x.requires_grad_(), w1)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(x1.sum(), x)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, sparse_operators; print(sorted({'torch', 'triton'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_cpu_needs_no_triton(new_python: Readied) -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None;"
        "from sparse_operators import sparse_down;"
        "print(sparse_down(torch.ones(1, 2), torch.ones(2, 3)).tolist())"
    )
    # Compiling takes seconds and is no subject here.
    found = new_python(code, NUMBA_DISABLE_JIT="1")
    assert (found.returncode, found.stdout.strip()) == (0, "[[2.0, 2.0, 2.0]]"), found.stderr


def test_an_unknown_name() -> None:
    import sparse_operators

    with pytest.raises(AttributeError, match="no attribute 'sparse_sideways'"):
        _ = sparse_operators.sparse_sideways
