"""How launches are cut up, tuned, kept for later processes, and given their counters."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import interpreted
import pytest
import torch

from sparse_operators.timing import Operation
from sparse_operators.triton_launch import (
    Launch,
    Problem,
    candidates,
    default_launch,
    keep_launches,
    launch_file,
    launch_for,
    rows_each,
    tuned_launches,
)

pytestmark = pytest.mark.skipif(not interpreted.NEW_TRITON, reason="needs triton 3.7 or newer")

PROBLEM = Problem(operator="down", tokens=1, d_model=64, d_ff=64, dtype="float16", processors=2)
SHAPES = [(1, 1), (37, 100), (300, 64), (11008, 4096), (13824, 5120), (14336, 16384)]


@pytest.fixture(scope="module")
def interpreter() -> Callable[..., Any]:
    return interpreted.start()


@pytest.mark.parametrize(("d_ff", "d_model"), SHAPES)
@pytest.mark.parametrize(
    ("operator", "tokens"), [("up", 1), ("up", 8), ("down", 1), ("down", 8), ("up_down", 1)]
)
def test_default_launches_cover_every_row_once(
    d_ff: int, d_model: int, operator: Any, tokens: int
) -> None:
    problem = replace(PROBLEM, operator=operator, tokens=tokens, d_model=d_model, d_ff=d_ff)
    launch = default_launch(problem)
    run = 16 if operator == "down" else 1
    rows, programs = rows_each(d_ff, launch.programs, run), launch.programs
    # The arithmetic of triton_kernels.owned_rows.
    owned = [
        (i // run * programs + program) * run + i % run
        for program, i in itertools.product(range(programs), range(rows))
    ]
    assert len(owned) == len(set(owned))
    assert set(range(d_ff)) <= set(owned)
    assert launch.group >= (16 if tokens > 1 else 1)


def up_down_when_tuned(favourite: str, cache: str) -> tuple[dict[str, bool], int]:
    """Tune with a made-up clock, keep the choices, and call `up_down` (in the child).

    Returns the default of which operators was kept, and how often the fused kernel then ran.
    """
    from sparse_operators import cuda, triton_tuning

    calls, fused_calls = 0, 0
    fused = cuda.up_down_fused

    def clock(operation: Operation, slots: int) -> float:
        nonlocal calls
        calls += 1
        if calls <= 2:
            operation.run(slots - 1)
        return 1.0 / calls if favourite == "last" else float(calls)

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal fused_calls
        fused_calls += 1
        return fused(*args, **options)

    scores, x, weights = torch.ones(3, 1, 32), torch.ones(3, 1, 16), torch.ones(3, 32, 16)
    chosen = triton_tuning.tune([scores, scores], x, weights, clock).chosen
    given = (scores[0], x[0], weights[0], weights[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PSP_CACHE_DIR", cache)
        patch.setattr(cuda, "up_down_fused", counted)
        keep_launches(chosen, x.device)
        for deterministic in (False, True):
            y = cuda.up_down(*given, deterministic=deterministic)
            assert y.tolist() == [[512.0] * 16]
    kept = tuned_launches(x.device).items()
    return {each.operator: launch == default_launch(each) for each, launch in kept}, fused_calls


def test_tuning_keeps_the_fastest(interpreter: Callable[..., Any], tmp_path: Path) -> None:
    # Times fall: the last candidate of each wins, and the fused kernel comes last of all.
    run = ("up_down_when_tuned", "last", str(tmp_path))
    kept, fused_calls = interpreter(*run, module="test_sparse_launch")
    assert kept == {"up": False, "down": False, "up_down": False}
    assert fused_calls == 1, "not where deterministic results are asked for"
    # Times rise: the default, tried first, wins, and the fused kernel loses to the chain.
    run = ("up_down_when_tuned", "first", str(tmp_path))
    kept, fused_calls = interpreter(*run, module="test_sparse_launch")
    assert kept == {"up": True, "down": True}
    assert fused_calls == 0


def test_every_candidate_is_compiled_before_any_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    from sparse_operators import triton_tuning
    from sparse_operators.cuda import problem_of

    seen: list[tuple[str, bool]] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        seen.append((self.__name__, warmup))

    def clock(operation: Operation, slots: int) -> float:
        before = len(seen)
        operation.run(0)
        assert not any(warmup for _, warmup in seen[before:])
        return 1.0

    monkeypatch.setattr(JITFunction, "run", record)
    sizes = ((3, 1, 96), (3, 1, 128), (3, 96, 128))
    scores, x, weights = (torch.empty(*size, device="meta") for size in sizes)
    tuning = triton_tuning.tune([scores], x, weights, clock)
    compiled = [name for name, warmup in seen if warmup]
    tried = {name: len(times) for name, times in tuning.tried.items()}
    assert len(compiled) == tried["up"] + tried["down"] + 2 * tried["up_down"]
    assert {"up_one_token", "down_slots", "down_listed", "down_tiles"} <= set(compiled)
    for operator, times in tuning.tried.items():
        assert list(times) == list(candidates(problem_of(operator, scores[0], 128)))


def test_hopeless_candidates_meet_one_case() -> None:
    from sparse_operators.triton_tuning import _fastest, _times

    problem = replace(PROBLEM, operator="up")
    launches = list(candidates(problem))
    # Twice as slow as the first one, but for the last, which is slower in the first case alone.
    early = dict.fromkeys(launches[1:-1], 2.0) | {launches[0]: 1.0, launches[-1]: 1.2}

    def time(launch: Launch, case: int) -> float:
        return early[launch] if case == 0 or launch != launches[-1] else 0.5

    tried = _times(problem, time, range(3))
    assert [len(times) for times in tried.values()] == [3, *[1] * (len(launches) - 2), 3]
    assert _fastest(tried) == launches[-1]


def other_launch(problem: Problem) -> Launch:
    return list(candidates(problem))[-1]


CARDS = itertools.count(1)


@pytest.fixture
def card() -> torch.device:
    """A device that no test has used: to it, this is a process of its own."""
    return torch.device("cpu", next(CARDS))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, card: torch.device) -> Path:
    """The card's file, with another launch than the default for `PROBLEM`."""
    monkeypatch.setenv("PSP_CACHE_DIR", str(tmp_path))
    return keep_launches({PROBLEM: other_launch(PROBLEM)}, card)


def test_deterministic_calls_ignore_tuning(kept: Path, card: torch.device) -> None:
    assert launch_for(PROBLEM, card) == other_launch(PROBLEM) != default_launch(PROBLEM)
    assert launch_for(PROBLEM, card, deterministic=True) == default_launch(PROBLEM)


def test_later_processes_take_what_was_kept(kept: Path) -> None:
    later = torch.device("cpu", next(CARDS))
    assert tuned_launches(later) == {PROBLEM: other_launch(PROBLEM)}
    second = replace(PROBLEM, operator="up")
    keep_launches({second: other_launch(second), PROBLEM: None}, later)
    latest = torch.device("cpu", next(CARDS))
    assert tuned_launches(latest) == {second: other_launch(second)}
    kept.unlink()
    assert tuned_launches(latest) == {second: other_launch(second)}, "read once"
    assert tuned_launches(torch.device("cpu", next(CARDS))) == {}


CHOICE = ("choices", 0)
DAMAGES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("kind",), "psp.other", "'kind'"),
    (("schema_version",), 2, "'schema_version'"),
    (("psp",), "0.0.1", "'psp' is '0.0.1'"),
    (("triton",), "2.0.0", "'triton' is '2.0.0'"),
    (("card",), "NVIDIA A100", "'card' is 'NVIDIA A100'"),
    (("choices",), {}, "'choices'"),
    ((*CHOICE, "launch", "programs"), 0, "'choices[0]' is no launch"),
    ((*CHOICE, "launch", "group"), 3, "'choices[0]' is no launch"),
    ((*CHOICE, "launch", "warps"), "4", "'choices[0].launch.warps'"),
    ((*CHOICE, "problem", "d_model"), 0, "'choices[0].problem.d_model'"),
    ((*CHOICE, "problem", "tokens"), 2, "'choices[0]' is no launch"),
    ((*CHOICE, "problem", "processors"), 132, "'choices[0]' is no launch"),
    ((*CHOICE, "problem", "dtype"), "int8", "'choices[0].problem.dtype'"),
]


@pytest.mark.parametrize(("place", "value", "said"), DAMAGES)
def test_a_damaged_or_foreign_file_is_passed_over(
    kept: Path, caplog: pytest.LogCaptureFixture, place: tuple[Any, ...], value: Any, said: str
) -> None:
    document = json.loads(kept.read_text())
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    kept.write_text(json.dumps(document))
    passed_over(kept, caplog, said)


def passed_over(kept: Path, caplog: pytest.LogCaptureFixture, said: str) -> None:
    later = torch.device("cpu", next(CARDS))
    for _ in range(2):
        assert launch_for(PROBLEM, later) == default_launch(PROBLEM)
    (record,) = caplog.records
    message = record.getMessage()
    assert record.levelno == logging.WARNING
    assert message.startswith(f"warning: {kept}: ")
    assert said in message
    assert message.endswith("until psp bench-operators --tune measures again")
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"kind": ' + b"[" * 100_000])
def test_a_file_that_is_no_document_is_passed_over(
    kept: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    kept.write_bytes(content)
    passed_over(kept, caplog, "")


def test_where_launches_are_kept(monkeypatch: pytest.MonkeyPatch, card: torch.device) -> None:
    monkeypatch.delenv("PSP_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    name = "launches/triton-s-interpreter-2-multiprocessors.json"
    assert str(launch_file(card)) == f"/home/me/.cache/psp/{name}"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(launch_file(card)) == f"/caches/psp/{name}"
    monkeypatch.setenv("PSP_CACHE_DIR", "/elsewhere")
    assert str(launch_file(card)) == f"/elsewhere/{name}"


def test_captured_launches_never_share_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_operators import cuda

    capturing = True
    device = torch.device("cuda", 0)
    arena = cuda.Arena(torch.arange(100, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch, "zeros", lambda *size, **_: torch.full(size, -1))
    sets = [cuda.tickets(device, 30, {device: arena}).tolist() for _ in range(4)]
    # Three sets of the arena, then memory of the graph's own.
    assert sets == [list(range(s, s + 30)) for s in (0, 30, 60)] + [[-1] * 30]


def test_each_stream_has_its_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_operators import cuda

    class Stream:
        cuda_stream = 1

    device = torch.device("cuda", 0)
    made: list[int] = []

    def zeros(count: int, **_: object) -> torch.Tensor:
        made.append(count)
        return torch.full((count,), len(made))

    arenas = {device: cuda.Arena(torch.arange(0, dtype=torch.int32))}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream)
    monkeypatch.setattr(torch, "zeros", zeros)
    assert int(cuda.tickets(device, 8, arenas)[0]) == 1
    assert int(cuda.tickets(device, 5, arenas)[0]) == 1
    assert int(cuda.tickets(device, 9, arenas)[0]) == 2
    Stream.cuda_stream = 2
    assert int(cuda.tickets(device, 5, arenas)[0]) == 3
    assert made == [8, 9, 5]
