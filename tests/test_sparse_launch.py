"""How launches are cut up, tuned, and given their counters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import interpreted
import pytest
import torch

pytestmark = pytest.mark.skipif(not interpreted.NEW_TRITON, reason="needs triton 3.7 or newer")

SHAPES = [(1, 1), (37, 100), (300, 64), (11008, 4096), (13824, 5120), (14336, 16384)]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable[..., Any]]:
    child = interpreted.start()
    yield child
    child.pool.shutdown()


@pytest.mark.parametrize(("d_ff", "d_model"), SHAPES)
@pytest.mark.parametrize(
    ("operator", "tokens"), [("up", 1), ("up", 8), ("down", 1), ("down", 8), ("up_down", 1)]
)
def test_default_launches_cover_every_row_once(
    d_ff: int, d_model: int, operator: Any, tokens: int
) -> None:
    from sparse_operators.triton_launch import Problem, default_launch, rows_each

    problem = Problem(
        operator=operator,
        tokens=tokens,
        d_model=d_model,
        d_ff=d_ff,
        dtype=torch.float16,
        device=torch.device("cpu"),
    )
    launch = default_launch(problem)
    run = 16 if operator == "down" else 1
    rows, programs = rows_each(d_ff, launch.programs, run), launch.programs
    # The arithmetic of triton_rows.owned_rows.
    owned = [
        (i // run * programs + program) * run + i % run
        for program, i in itertools.product(range(programs), range(rows))
    ]
    assert len(owned) == len(set(owned))
    assert set(range(d_ff)) <= set(owned)
    assert launch.group >= (16 if tokens > 1 else 1)


def tuned_with_times(favourite: str) -> list[tuple[str, bool]]:
    """Tune a small shape with a clock that loves one operator's last candidate (in the child)."""
    from sparse_operators import triton_launch, triton_tuning

    calls = 0

    def clock(call: Callable[[], object]) -> float:
        nonlocal calls
        calls += 1
        name = call.args[0].__class__.__name__  # type: ignore[attr-defined]
        assert name == "Launch"
        if calls <= 2:
            call()
        return 1.0 / calls if favourite == "late" else float(calls)

    shape = triton_tuning.Shape(d_model=16, d_ff=32, device="cpu", dtype=torch.float32)
    triton_tuning.tune(shape, clock)
    return [
        (problem.operator, launch == triton_launch.default_launch(problem))
        for problem, launch in triton_launch.tuned.items()
    ]


def test_tuning_keeps_the_fastest(interpreter: Callable[..., Any]) -> None:
    # Times fall: the last candidate of each wins, and the fused kernel comes last of all.
    late = interpreter("tuned_with_times", "late", module="test_sparse_launch")
    assert late == [("up", False), ("down", False), ("up_down", False)]
    # Times rise: the default, tried first, wins, and the fused kernel loses to the chain.
    early = interpreter("tuned_with_times", "early", module="test_sparse_launch")
    assert early == [("up", True), ("down", True)]


def test_deterministic_calls_ignore_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_operators import triton_launch
    from sparse_operators.triton_launch import Launch, Problem, launch_for

    problem = Problem(
        operator="down",
        tokens=1,
        d_model=64,
        d_ff=64,
        dtype=torch.float16,
        device=torch.device("cpu"),
    )
    other = Launch(programs=1, group=16, columns=16, warps=1)
    monkeypatch.setitem(triton_launch.tuned, problem, other)
    assert launch_for(problem) == other
    assert launch_for(problem, deterministic=True) == triton_launch.default_launch(problem)


def test_captured_launches_never_share_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_operators import triton_tickets

    capturing = True
    device = torch.device("cuda", 0)
    arena = triton_tickets._Arena(torch.arange(100, dtype=torch.int32))
    monkeypatch.setitem(triton_tickets._arenas, device, arena)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch, "zeros", lambda *size, **_: torch.full(size, -1))
    sets = [triton_tickets.tickets(device, 30).tolist() for _ in range(4)]
    # Three sets of the arena, then memory of the graph's own.
    assert sets == [list(range(s, s + 30)) for s in (0, 30, 60)] + [[-1] * 30]


def test_each_stream_has_its_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_operators import triton_tickets

    class Stream:
        cuda_stream = 1

    device = torch.device("cuda", 0)
    made: list[int] = []

    def zeros(count: int, **_: object) -> torch.Tensor:
        made.append(count)
        return torch.full((count,), len(made))

    arena = triton_tickets._Arena(torch.arange(0, dtype=torch.int32))
    monkeypatch.setitem(triton_tickets._arenas, device, arena)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream)
    monkeypatch.setattr(torch, "zeros", zeros)
    assert int(triton_tickets.tickets(device, 8)[0]) == 1
    assert int(triton_tickets.tickets(device, 5)[0]) == 1
    assert int(triton_tickets.tickets(device, 9)[0]) == 2
    Stream.cuda_stream = 2
    assert int(triton_tickets.tickets(device, 5)[0]) == 3
    assert made == [8, 9, 5]
