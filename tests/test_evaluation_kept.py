"""What an evaluation keeps: answers batch by batch, through kills, full disks and scarce memory."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from asked_tasks import own_task, settings_maker, write_tasks
from conftest import ModelMaker, refused

from architectures.model import OutOfMemory
from common.errors import OutputError, SettingsError
from common.lock import locked
from evaluation.answers import DIRECTORY, Batch, file_name
from evaluation.backends.backend import Score, Scoring
from evaluation.backends.transformers_model import TransformersBackend
from evaluation.run import evaluate
from evaluation.settings import EvaluateConfig
from results.evaluation import EVALUATION, Evaluation

NAMES = ("choose", "cloze", "continue", "pages")
RESAMPLES = 20


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard errors without a formula are lm-eval's own, and slow."""
    monkeypatch.setattr("evaluation.scoring.BOOTSTRAP", RESAMPLES)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own")


@pytest.fixture(scope="module")
def settings(model_dir: Path, tasks: Path) -> Callable[..., EvaluateConfig]:
    return settings_maker(model_dir, tasks)


def comparable(result: Evaluation) -> dict[str, Any]:
    """Return what no clock is in."""
    from common.typed_json import plain

    found: dict[str, Any] = plain(result)
    del found["created"]
    for arm in found["arms"]:
        del arm["seconds"]
    return found


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.fixture(scope="module")
def unbroken(settings: Callable[..., EvaluateConfig], exact_dir: Path) -> Evaluation:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.scoring.BOOTSTRAP", RESAMPLES)
        return evaluate(settings(predictors=(exact_dir,), batch_size=3))


@pytest.mark.parametrize("after", [1, 4, 9])
def test_a_killed_run_goes_on_to_the_same_document(
    after: int,
    unbroken: Evaluation,
    settings: Callable[..., EvaluateConfig],
    exact_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def config(out: str, **changes: Any) -> EvaluateConfig:
        changes |= {"predictors": (exact_dir,), "batch_size": 3, "output_path": tmp_path / out}
        return settings(**changes)

    calls = 0
    own = TransformersBackend.score

    def dying(self: TransformersBackend, batch: Sequence[Scoring]) -> list[list[Score]]:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Killed
        return own(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersBackend, "score", dying)
        with pytest.raises(Killed):
            evaluate(config("broken"))
    kept = tmp_path / "broken" / DIRECTORY
    with (kept / "dense.jsonl").open("ab") as file:
        file.write(b'{"keys": ["half of a li')
    with refused(OutputError, "--resume to go on with it"):
        evaluate(config("broken"))
    calls = -1000
    with monkeypatch.context() as patch:
        patch.setattr(TransformersBackend, "score", dying)
        again = evaluate(config("broken", resume=True))
    assert comparable(again) == comparable(unbroken)
    answered = calls + 1000
    calls = -1000
    with monkeypatch.context() as patch:
        patch.setattr(TransformersBackend, "score", dying)
        assert comparable(evaluate(config("broken", resume=True))) == comparable(unbroken)
    assert calls == -1000 < answered - 1000  # nothing is asked twice


def test_another_arm_or_limit_goes_on_with_what_is_known(
    settings: Callable[..., EvaluateConfig], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    few = evaluate(settings(output_path=out, limit=4))
    assert {task.questions for task in few.tasks} == {4}
    more = evaluate(settings(output_path=out, resume=True, thresholds=(0.0,)))
    assert {task.questions for task in more.tasks} == {12}
    relu = [each for each in more.differences if each.arm == "relu"]
    assert len(relu) == 4
    assert all(each.difference == 0 and not each.changed for each in relu)


def test_answers_of_another_model_are_not_taken(
    settings: Callable[..., EvaluateConfig], make_model: ModelMaker, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluate(settings(output_path=out, limit=2))
    other = make_model(tmp_path / "other", seed=5)
    with refused(OutputError, "was begun with model_hash", "--force", "--output-path"):
        evaluate(settings(model=(str(other),), output_path=out, limit=2, resume=True))
    evaluate(settings(model=(str(other),), output_path=out, limit=2, force=True))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    with refused(OutputError, "was not made by this command"):
        evaluate(settings(output_path=tmp_path / "foreign", force=True))


def test_a_shortage_of_memory_halves_batches_and_is_told_once(
    settings: Callable[..., EvaluateConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = evaluate(settings(batch_size=2))
    own = TransformersBackend.score

    def scarce(self: TransformersBackend, batch: Sequence[Scoring]) -> list[list[Score]]:
        if len(batch) > 2:
            raise OutOfMemory("cpu: out of memory")
        return own(self, batch)

    monkeypatch.setattr(TransformersBackend, "score", scarce)
    notes: list[str] = []
    out = tmp_path / "out"
    result = evaluate(settings(batch_size=8, output_path=out), notes.append)
    told = [line for line in notes if "not enough memory" in line]
    assert told == [
        f"not enough memory for {before} requests at once: {after} from here on, with which "
        f"--batch-size {after} begins"
        for before, after in ((8, 4), (4, 2))
    ]
    assert result.arms[0].batch_size == 2
    assert [s.value for s in result.scores] == pytest.approx([s.value for s in plain.scores])
    notes.clear()
    again = evaluate(settings(batch_size=8, output_path=out, resume=True), notes.append)
    assert comparable(again)["scores"] == comparable(result)["scores"]
    assert not [line for line in notes if "not enough memory" in line]


def test_zeros_of_a_batch_without_answers_are_not_counted(
    settings: Callable[..., EvaluateConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = evaluate(settings(batch_size=2))
    own = TransformersBackend.score

    def late(self: TransformersBackend, batch: Sequence[Scoring]) -> list[list[Score]]:
        found = own(self, batch)
        if len(batch) > 2:
            raise OutOfMemory("cpu: out of memory")
        return found

    monkeypatch.setattr(TransformersBackend, "score", late)
    result = evaluate(settings(batch_size=4))
    assert result.arms[0].sparsity == plain.arms[0].sparsity


def test_a_full_disk_ends_the_run_and_a_resume_goes_on(
    settings: Callable[..., EvaluateConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, synced, sync = tmp_path / "out", [0], os.fsync

    def full(descriptor: int) -> None:
        synced[0] += 1
        if synced[0] == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    config = {"output_path": out, "batch_size": 3}
    with monkeypatch.context() as patch:
        patch.setattr("common.json_lines.os.fsync", full)
        with refused(OutputError, "No space left on device"):
            evaluate(settings(**config))
    result = evaluate(settings(**config, resume=True))
    plain = evaluate(settings(batch_size=3))
    assert comparable(result) == comparable(plain)


def test_samples_and_document_are_of_one_evaluation_whenever_it_is_killed(
    settings: Callable[..., EvaluateConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    asked = {"tasks": (own_task(tmp_path / "own", "mine", "acc", output_type="multiple_choice"),)}
    common: dict[str, Any] = {**asked, "output_path": out, "log_samples": True}

    def results() -> dict[str, bytes]:
        found = [out / EVALUATION.name, *(out / "samples").glob("*")]
        return {file.name: file.read_bytes() for file in found if file.exists()}

    def killed(*given: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(type(EVALUATION), "write", killed)
        with pytest.raises(Killed):
            evaluate(settings(**common, limit=2))
    assert list(results()) == ["dense_mine.jsonl"], "the document is last"
    evaluate(settings(**common, limit=2, resume=True))
    few = results()
    with monkeypatch.context() as patch:
        patch.setattr("common.outputs.exchange", killed)
        with pytest.raises(Killed):
            evaluate(settings(**common, limit=4, resume=True))
    assert results() == few
    assert [path.name for path in tmp_path.glob(".*")] == [".out.changed"]
    evaluate(settings(**asked, output_path=out, limit=4, resume=True))
    assert not list(tmp_path.glob(".*")), "what the killed one left is gone"
    assert [len(file.split(b"\n")) for file in results().values()][1:] == [5], "as the document"


def test_long_names_of_tasks_have_files(
    settings: Callable[..., EvaluateConfig], tmp_path: Path
) -> None:
    assert file_name("n" * 90) == "n" * 90
    assert len(file_name("ü" * 300).encode()) < 120
    assert file_name("n" * 300 + "a") != file_name("n" * 300 + "b")
    directory = tmp_path / "own"
    tasks = own_task(directory, "mine", "acc", output_type="multiple_choice")
    file = directory / "mine.yaml"
    file.write_text(file.read_text().replace("task: mine", f"task: {'n' * 300}"))
    out = tmp_path / "out"
    evaluate(settings(tasks=(tasks,), output_path=out, log_samples=True, limit=2))
    assert len(list((out / "samples").iterdir())) == 1


def test_what_is_drawn_hangs_on_no_batch(
    settings: Callable[..., EvaluateConfig], tmp_path: Path
) -> None:
    drawn = {"until": ["\n"], "max_gen_toks": 4, "do_sample": True, "temperature": 1.0}
    how: dict[str, Any] = {"output_type": "generate_until", "generation_kwargs": drawn}
    tasks = own_task(tmp_path / "own", "mine", "exact_match", repeats=2, **how)

    def texts(out: str, **changes: Any) -> list[list[str]]:
        common = {"tasks": (tasks,), "output_path": tmp_path / out, "log_samples": True}
        evaluate(settings(**common, **changes))
        lines = (tmp_path / out / "samples" / "dense_mine.jsonl").read_bytes().splitlines()
        return [json.loads(line)["resps"][0] for line in lines]

    whole = texts("whole", batch_size=5)
    assert all(one != other for one, other in whole)
    few = texts("broken", batch_size=5, limit=3)
    assert few == whole[:3]
    assert texts("broken", batch_size=5, resume=True) == whole


def test_one_process_at_a_time_writes_a_directory(
    settings: Callable[..., EvaluateConfig], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with locked(out):
        for how in ({"resume": True}, {"force": True}, {}):
            with refused(OutputError, f"being written by pid {os.getpid()}", "--output-path"):
                evaluate(settings(output_path=out, limit=1, **how))
    evaluate(settings(output_path=out, limit=1))
    with locked(out), refused(OutputError, "being written by pid"):
        evaluate(settings(output_path=out, limit=1, force=True))
    assert EVALUATION.read(out).limit == 1
    with refused(OutputError, f"{out} exists", "another --output-path"):
        evaluate(settings(output_path=out, limit=1))


def test_arms_that_would_share_a_file_are_refused(
    settings: Callable[..., EvaluateConfig], model_dir: Path, tmp_path: Path
) -> None:
    for name in ("a b", "a_b"):
        (tmp_path / name).symlink_to(model_dir)
    models = (str(model_dir), str(tmp_path / "a b"), str(tmp_path / "a_b"))
    with refused(SettingsError, "two arms are named a b", "rename"):
        evaluate(settings(model=models))


def test_damaged_answers_are_refused(
    settings: Callable[..., EvaluateConfig], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluate(settings(output_path=out, limit=2))
    file = out / DIRECTORY / "dense.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    batch = Batch(keys=("a", "b"), answers=("x",), tokens=1, seconds=0.0, size=1)
    from common.json_lines import line_of
    from common.typed_json import plain

    for wrong in (b"{}\n", b"nonsense\n", line_of(plain(batch)), lines[-1]):
        file.write_bytes(b"".join([*lines, wrong]))
        with refused(OutputError, f"line {len(lines) + 1} is damaged", "--force"):
            evaluate(settings(output_path=out, limit=2, resume=True))
