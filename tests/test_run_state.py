"""Records of `psp run`: content by hash, what begins anew, and a damaged file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import refused

from common.errors import OutputError
from pipeline.contents import Contents, files_in, model_files
from pipeline.state import STATE, RunState, Step, check_out


@dataclass(frozen=True, kw_only=True)
class Settings:
    tokens: int
    out: str = "here"
    resume: bool = False


def step(place: Path, tokens: int = 3, out: str = "here") -> Step:
    def files(*names: str) -> Iterable[Path]:
        return [place / name for name in names]

    def work(resume: bool) -> None:
        (place / "made").mkdir(exist_ok=True)
        (place / "made" / "result").write_text((place / "input").read_text() * tokens)

    return Step(
        name="multiply",
        settings=(Settings(tokens=tokens, out=out),),
        inputs={"text": lambda: files("input")},
        made=(place / "made",),
        outputs=lambda: files("made/result"),
        work=work,
    )


def done(place: Path) -> RunState:
    (place / "input").write_text("one ")
    state = RunState(place)
    assert not state.begin(step(place))
    step(place).work(False)
    state.commit(step(place), 1.5)
    return RunState.read(place)


def test_a_finished_step_is_known_by_content(tmp_path: Path) -> None:
    state = done(tmp_path)
    assert state.finished(step(tmp_path))
    assert state.finished(step(tmp_path, out="elsewhere")), "where it lies changes no result"
    assert not state.finished(step(tmp_path, tokens=4))
    os.utime(tmp_path / "input", (1, 1))
    os.utime(tmp_path / "made" / "result", (1, 1))
    assert RunState.read(tmp_path).finished(step(tmp_path)), "times alone say nothing"
    (tmp_path / "input").write_text("two ")
    assert not RunState.read(tmp_path).finished(step(tmp_path)), "of the same size"


def test_a_changed_or_missing_result_is_not_finished(tmp_path: Path) -> None:
    result = tmp_path / "made" / "result"
    done(tmp_path)
    result.write_text("mine")
    assert not RunState.read(tmp_path).finished(step(tmp_path))
    result.unlink()
    assert not RunState.read(tmp_path).finished(step(tmp_path))


def test_only_the_same_step_goes_on(tmp_path: Path) -> None:
    (tmp_path / "input").write_text("one ")
    state = RunState(tmp_path)
    assert not state.begin(step(tmp_path))
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "half").write_text("of a killed run")
    state = RunState.read(tmp_path)
    assert not state.finished(step(tmp_path))
    assert state.begin(step(tmp_path))
    assert (tmp_path / "made" / "half").exists()
    assert not RunState.read(tmp_path).begin(step(tmp_path, tokens=4))
    assert not (tmp_path / "made").exists(), "of other settings"


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with refused(OutputError, "multiply: its text is missing"):
        RunState(tmp_path).begin(step(tmp_path))
    assert not (tmp_path / STATE).exists()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"kind": "psp.bench", "schema_version": 1}',
        '{"kind": "psp.run", "schema_version": 2}',
        '{"kind": "psp.run", "schema_version": 1, "tool_version": "0", "steps": {"a": 1}}',
        json.dumps({"kind": "psp.run", "schema_version": 1, "steps": {}, "files": {}}),
    ],
)
def test_a_damaged_state_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / STATE).write_text(content)
    with refused(OutputError, STATE, "--force"):
        RunState.read(tmp_path)


def test_a_directory_of_others_is_refused(tmp_path: Path) -> None:
    check_out(tmp_path / "new", resume=False, force=False)
    check_out(tmp_path, resume=True, force=False)  # is empty
    (tmp_path / "mine").write_text("precious")
    for resume, force in ((False, False), (True, False), (False, True)):
        with refused(OutputError, str(tmp_path), "--out"):
            check_out(tmp_path, resume=resume, force=force)


def test_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"abc")
    first = Contents({})
    digest = first.digest([file])
    again = Contents(first.asked)
    monkeypatch.setattr("pipeline.contents.hash_file", lambda path: pytest.fail("read again"))
    assert again.digest([file]) == digest
    assert again.asked == first.asked
    assert again.digest([tmp_path / "missing"]) is None
    assert again.digest([]) is None


def test_which_files_make_a_model(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "README.md", ".cache", "training/log.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [path.name for path in model_files(tmp_path)] == ["config.json", "model.safetensors"]
    names = [str(path.relative_to(tmp_path)) for path in files_in(tmp_path)]
    assert names == ["README.md", "config.json", "model.safetensors", "training/log.jsonl"]
    assert files_in(tmp_path / "nowhere") == []
