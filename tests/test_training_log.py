"""A training's log: what is read of it, and what a killed process leaves."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import refused

from common.errors import OutputError
from common.json_lines import append
from prosparse.schedule import Schedule
from prosparse.training_log import Journal, read_log


@pytest.mark.parametrize(
    ("key", "value"), [("step", "1"), ("sparsity", [0.5]), ("sparsity", []), ("lambda", None)]
)
def test_a_damaged_log_is_refused(tmp_path: Path, key: str, value: object) -> None:
    line = {"step": 1, "stage": 0, "lambda": 0.0, "sparsity": [0.5, 0.5], "lm_loss": math.inf}
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f"{json.dumps(each)}\n" for each in (line, line)) + "{")
    assert read_log(log) == [line, line]  # the unfinished one is left out
    log.write_text("".join(f"{json.dumps(each)}\n" for each in (line, line | {key: value})))
    with refused(OutputError, "log.jsonl: line 2 is damaged", "--force"):
        read_log(log)


def test_a_kill_as_lines_are_taken_back_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.jsonl"
    lines = [{"step": n, "stage": 0, "lambda": 0.0, "sparsity": [0.5]} for n in (2, 4, 6)]
    for line in lines:
        append(log, line)
    journal = Journal(log, Schedule.of(("sft", 0, 8)))
    state = SimpleNamespace(is_world_process_zero=True, global_step=4, max_steps=8)

    def killed(*names: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            journal.on_train_begin(None, state, None)
    assert read_log(log) == lines
    journal.on_train_begin(None, state, None)
    journal.on_train_end(None, state, None)
    assert read_log(log) == lines[:2]
