"""The frame of `python -m benchmarks.gpu`: what fits, what is kept, what a stage may do."""

from __future__ import annotations

import json
import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import refused
from gpu_steps import ABSENT, BROKEN, DEAD, ENDLESS, GOOD, INFINITE, REFUSED, UNHEARD

from benchmarks.gpu import marked_tests
from benchmarks.gpu.__main__ import main, stages_of, summary
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.kit import Absent, Figure, Kit, Step
from benchmarks.gpu.plan import LIMITS, MODULES, START_SECONDS, plan, steps_of
from benchmarks.gpu.stage import run_stage
from common.errors import ResultError
from common.lock import locked
from results.card import CARD, StepEnd

MACHINE: dict[str, object] = {"card": "a card", "driver": "1"}


def kit(out: Path, **changes: Any) -> Kit:
    settings: dict[str, Any] = {"device": "cpu", "dry": False, "model": out, "data": out}
    return Kit(out=out, eval_data=out, **settings | changes)


def begun(out: Path) -> Journal:
    journal = Journal(out)
    journal.begin(MACHINE, dry=False)
    return journal


def ends(journal: Journal) -> dict[str, str]:
    return {end.step: end.end for end in journal.card().steps}


def step(name: str, seconds: float) -> Step:
    return Step(name=name, seconds=seconds, run=GOOD.run)


def end(step: str, how: Any = "done") -> StepEnd:
    return StepEnd(stage="smoke", step=step, end=how, line="", seconds=1.0)


def test_steps_are_planned_while_they_fit_into_the_stage_and_into_the_time() -> None:
    left = LIMITS["smoke"] - START_SECONDS
    stages = {
        "smoke": (step("a", left - 10), step("too long", 11), step("b", 10)),
        "operators": (step("c", 20), step("d", 20)),
    }
    found = plan(stages, (), seconds=1000)
    assert {stage: [each.name for each in steps] for stage, steps in found.steps.items()} == {
        "smoke": ["a", "b"],
        "operators": ["c", "d"],
    }
    assert found.left_out == [("smoke", "too long")]
    short = plan(stages, (), seconds=LIMITS["smoke"] + START_SECONDS + 20)
    assert [each.name for each in short.steps["operators"]] == ["c"]
    assert short.left_out == [("smoke", "too long"), ("operators", "d")]


def test_what_is_done_is_not_planned_and_costs_no_start() -> None:
    stages = {"smoke": (step("a", 20),), "operators": (step("b", 20),)}
    found = plan(stages, {("smoke", "a")}, seconds=START_SECONDS + 20)
    assert list(found.steps) == ["operators"]
    assert not found.left_out


def test_every_stage_has_a_limit_that_its_first_step_keeps() -> None:
    assert LIMITS.keys() == MODULES.keys()
    for stage in MODULES:
        steps = steps_of(stage)
        assert len({each.name for each in steps}) == len(steps)
        assert steps[0].seconds + START_SECONDS <= LIMITS[stage], stage


def test_a_stage_keeps_every_figure_and_how_each_step_went(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    run_stage(kit(tmp_path), "smoke", (REFUSED, BROKEN, ABSENT, GOOD), 60)
    card = journal.card()
    assert ends(journal) == {
        "refused": "failed",
        "broken": "failed",
        "absent": "absent",
        "good": "done",
    }
    lines = {each.step: each.line for each in card.steps}
    assert lines["refused"] == "text.jsonl: is empty; pass another"
    assert lines["broken"] == "ZeroDivisionError: float division by zero"
    figures = {each.name: each for each in card.figures}
    assert figures["speed"].met is True
    assert figures["speed"].details == {"device": "cpu"}
    assert figures["error"].met is False
    assert figures["before"].met is None
    assert "good" in summary(card)
    assert "absent: absent, no PowerInfer: pass --powerinfer-bin" in summary(card)


def test_a_process_that_dies_leaves_one_line_and_the_rest_is_left_out(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    run_stage(kit(tmp_path), "smoke", (GOOD, DEAD, ABSENT), 60)
    assert ends(journal) == {"good": "done", "dead": "failed", "absent": "left out"}
    assert "ended with code 7" in journal.card().steps[1].line


def test_a_stage_past_its_limit_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    start = time.monotonic()
    run_stage(kit(tmp_path), "smoke", (ENDLESS, GOOD), 6)
    assert time.monotonic() - start < 30
    assert ends(journal) == {"endless": "stopped", "good": "left out"}
    assert "limit of 6 s" in journal.card().steps[0].line
    (figure,) = journal.card().figures
    check_gone(int(figure.value))


def check_gone(process: int) -> None:
    for _ in range(100):
        if not psutil.pid_exists(process):
            return
        time.sleep(0.1)
    pytest.fail("a process lives on")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stage_ends_with_whoever_started_it(tmp_path: Path, number: signal.Signals) -> None:
    journal = begun(tmp_path)
    parent = get_context("spawn").Process(
        target=run_stage, args=(kit(tmp_path), "smoke", (ENDLESS,), 600)
    )
    parent.start()
    assert parent.pid is not None
    while not (figures := journal.card().figures):
        assert parent.is_alive()
        time.sleep(0.1)
    (stage,) = (
        child.pid
        for child in psutil.Process(parent.pid).children()
        if "spawn_main" in " ".join(child.cmdline())
    )
    os.kill(parent.pid, number)
    parent.join()
    check_gone(stage)
    check_gone(int(figures[0].value))


def test_a_figure_that_no_file_may_hold_fails_its_step_and_not_the_file(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    run_stage(kit(tmp_path), "smoke", (UNHEARD, INFINITE, GOOD), 60)
    assert ends(journal) == {"unheard": "failed", "infinite": "failed", "good": "done"}
    lines = [end.line for end in journal.card().steps]
    assert lines[:2] == [
        "perplexity: 'value': expected a finite number, found nan",
        "tuned: 'details.tried[1]': expected a finite number, found inf",
    ]
    assert "whole" in {each.name for each in journal.card().figures}


def test_a_dry_run_has_no_aims(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    run_stage(kit(tmp_path, dry=True), "smoke", (GOOD,), 60)
    assert [(each.most, each.least, each.met) for each in journal.card().figures] == [
        (None, None, None)
    ] * 2


def test_a_step_that_runs_again_replaces_what_it_found(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    journal.figure("smoke", "a", Figure(name="old", value=1))
    journal.end(end("a", "stopped"))
    journal.figure("smoke", "b", Figure(name="other", value=1))
    journal.end(end("b"))
    journal.end(end("a", "left out"))
    assert journal.done() == {("smoke", "b")}
    assert {each.name for each in journal.card().figures} == {"old", "other"}
    journal.figure("smoke", "a", Figure(name="new", value=2))
    journal.figure("smoke", "a", Figure(name="newer", value=2))
    journal.end(end("a"))
    card = journal.card()
    assert {each.name for each in card.figures} == {"new", "newer", "other"}
    assert journal.done() == {("smoke", "a"), ("smoke", "b")}
    assert CARD.read(journal.write()) == CARD.read(tmp_path)


def test_a_line_that_a_kill_cut_off_is_passed_over(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    journal.end(end("a"))
    with journal.path.open("a", encoding="utf-8") as file:
        file.write('{"stage": "smoke", "st')
    assert ends(journal) == {"a": "done"}
    journal.begin(MACHINE, dry=False)
    journal.end(end("b"))
    assert ends(journal) == {"a": "done", "b": "done"}


def test_a_rest_is_cut_off_before_anything_is_written_behind_it(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    with journal.path.open("a", encoding="utf-8") as file:
        file.write('{"stage": "smoke", "st')
    journal.end(end("a"))
    assert ends(journal) == {"a": "done"}
    journal.path.write_text('{"machi', encoding="utf-8")
    journal.begin(MACHINE, dry=False)
    assert ends(journal) == {}


def test_figures_are_kept_when_nobody_reads_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = begun(tmp_path)

    def closed(line: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("click.echo", closed)
    journal.figure("smoke", "a", Figure(name="kept", value=1))
    journal.end(end("a"))
    assert ends(journal) == {"a": "done"}
    assert [each.name for each in journal.card().figures] == ["kept"]


def test_going_on_writes_nothing_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full, or a kill, would take all figures."""
    journal = begun(tmp_path)
    journal.end(end("a"))
    monkeypatch.setattr("pathlib.Path.write_text", lambda *given, **named: pytest.fail("written"))
    journal.begin(MACHINE, dry=False)
    assert ends(journal) == {"a": "done"}


@pytest.mark.parametrize(
    "line",
    [b'{"machine": 5}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"\n"],
    ids=["no machine", "no text", "deep", "empty"],
)
def test_lines_of_others_are_refused_by_number(tmp_path: Path, line: bytes) -> None:
    journal = begun(tmp_path)
    with journal.path.open("ab") as file:
        file.write(line)
    with refused(ResultError, "line 2", "another --out"):
        journal.card()


def test_another_card_and_damaged_lines_are_refused(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    with refused(ResultError, str(tmp_path), "driver '1', not '2'", "another --out"):
        journal.begin(MACHINE | {"driver": "2"}, dry=False)
    with refused(ResultError, "dry False, not True"):
        journal.begin(MACHINE, dry=True)
    journal.path.write_text(journal.path.read_text() + '{"stage": 1}\n', encoding="utf-8")
    with refused(ResultError, "line 2", "another --out"):
        journal.card()


def arguments(place: Path) -> list[str]:
    model, text = place / "model", place / "text"
    model.mkdir(exist_ok=True)
    text.write_text("x")
    files = ("--model", str(model), "--data", str(text), "--eval-data", str(text))
    return ["--out", str(place / "out"), *files]


def run(place: Path, *words: str) -> Result:
    return CliRunner().invoke(main, [*arguments(place), *words])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_one_line_names_the_device(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "cannot run on device 'cuda'" in result.output
    assert "; pass --dry-run" in result.output
    assert not (tmp_path / "out").exists()


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    result = run(tmp_path, "--stages", "smoke,smok", "--dry-run")
    assert result.exit_code == 1
    assert "there is no 'smok'" in result.output
    result = CliRunner().invoke(main, [*arguments(tmp_path), "--stages", "smoke/x", "--dry-run"])
    assert result.exit_code == 1
    assert "there is no 'smoke/x'" in result.output
    assert "choose of collect, streamed" in result.output


def test_of_a_stage_only_the_steps_that_are_asked_for_are_run(tmp_path: Path) -> None:
    words = ("--stages", "operators/traced,smoke/decisions", "--budget", "1", "--dry-run")
    assert run(tmp_path, *words).exit_code == 0
    steps = CARD.read(tmp_path / "out").steps
    assert [(each.stage, each.step) for each in steps] == [
        ("smoke", "decisions"),
        ("operators", "traced"),
    ]


def test_a_place_that_does_not_do_is_told_in_a_line(tmp_path: Path) -> None:
    words = ("--stages", "smoke", "--budget", "1", "--dry-run")
    (tmp_path / "out").write_text("x")
    result = run(tmp_path, *words)
    assert result.exit_code == 1
    assert f"cannot write {tmp_path / 'out'}" in result.output
    (tmp_path / "out").unlink()
    (tmp_path / "out" / "figures.jsonl").mkdir(parents=True)
    result = run(tmp_path, *words)
    assert result.exit_code == 1
    assert "cannot write" in result.output
    with locked(tmp_path / "out"):
        result = run(tmp_path, *words)
    assert result.exit_code == 1
    assert "being written by pid" in result.output


def test_tests_that_do_not_run_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        Absent, match=r"^the gpu tests ran nothing: [^\n]* in [0-9.]+s; all of it: "
    ):
        list(marked_tests.tested(kit(tmp_path, dry=True), ["tests/test_gpu_kit.py"], 1))
    assert "deselected" in (tmp_path / "work" / "test_gpu_kit.txt").read_text()


def test_a_budget_is_a_number(tmp_path: Path) -> None:
    result = run(tmp_path, "--stages", "smoke", "--budget", "nan", "--dry-run")
    assert result.exit_code == 2
    assert "not a number" in result.output


def test_stages_and_steps_are_chosen_by_name_in_order_of_worth() -> None:
    chosen = stages_of("operators/traced, smoke, operators/13b-float16")
    assert list(chosen) == ["smoke", "operators"]
    assert chosen["smoke"] == steps_of("smoke")
    assert [each.name for each in chosen["operators"]] == ["13b-float16", "traced"]


def test_a_budget_in_which_nothing_fits_leaves_all_out_and_writes_the_card(tmp_path: Path) -> None:
    result = run(tmp_path, "--stages", "smoke", "--budget", "1", "--dry-run")
    assert result.exit_code == 0, result.output
    card = CARD.read(tmp_path / "out")
    assert card.dry
    assert {each.end for each in card.steps} == {"left out"}
    assert not card.figures
    lines = (tmp_path / "out" / "figures.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["machine"]["card"] is None
