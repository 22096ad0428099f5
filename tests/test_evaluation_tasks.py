"""Tasks are opened before any model, with what is wrong with them told in one line."""

from __future__ import annotations

import copy
import gc
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from local_tasks import ANIMALS, made_up_model, write_task

from common.errors import DataError
from evaluation.suites.card import CODE_TASKS, card_tasks
from evaluation.tasks.loading import (
    LoadedTasks,
    load_tasks,
)
from evaluation.tasks.quiet import quiet
from evaluation.tasks.templates import compiled_once


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@contextmanager
def _includes_once() -> Iterator[None]:
    """Parse what 14,000 task files include once: 670 files, that each task file parses anew."""
    import lm_eval.tasks._yaml_loader as loader

    load, parsed = loader.load_yaml, dict[Path, dict[str, Any]]()

    def load_once(path: Path, **options: Any) -> dict[str, Any]:
        if path not in parsed:
            parsed[path] = load(path, **options)
        return dict(parsed[path])

    gc.disable()  # that walks through all task files again and again as they come
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loader, "load_yaml", load_once)  # the index has its own name for whole
            yield
    finally:
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _one_index() -> Iterator[None]:
    """Read lm-eval's own 14,000 task files once, not for each test."""
    import lm_eval.tasks.manager as manager

    own, known = manager.TaskIndex.build, dict[str, Any]()

    def build(paths: Iterable[Path], **options: Any) -> dict[str, Any]:
        index: dict[str, Any] = {}
        for path in paths:
            if Path(path) == Path(manager.__file__).parent:
                if not known:
                    with _includes_once():
                        known.update(own([path], **options))
                    gc.freeze()  # held in no cycle, so that they go with their last name
                index |= {name: copy.copy(entry) for name, entry in known.items()}
            else:
                index |= own([path], **options)
        return index

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager.TaskIndex, "build", staticmethod(build))
        yield


def _answered(loaded: LoadedTasks, answer: Any) -> Any:
    from lm_eval.evaluator import evaluate

    loaded.reseed()
    with quiet():
        return evaluate(made_up_model(answer), loaded.task_dict, bootstrap_iters=0)


def _requests(loaded: LoadedTasks) -> list[Any]:
    loaded.reseed()
    with quiet():
        for task in loaded.tasks.values():
            task.build_all_requests()
    return [each.args for task in loaded.tasks.values() for each in task.instances]


def test_a_directory_stands_for_its_tasks_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path / "mine", "animals")
    write_task(tmp_path / "mine/deeper", "beasts")
    monkeypatch.chdir(tmp_path.parent)
    loaded = load_tasks([os.path.relpath(tmp_path / "mine")])
    assert list(loaded.tasks) == ["animals", "beasts"]
    assert len(loaded.tasks["beasts"].eval_docs) == len(ANIMALS)
    _requests(loaded)
    assert capfd.readouterr() == ("", "")


def test_a_file_a_name_and_a_pattern(tmp_path: Path) -> None:
    path = write_task(tmp_path, "animals", tag="mine")
    write_task(tmp_path, "beasts", tag="mine")
    assert list(load_tasks([str(path)]).tasks) == ["animals"]
    assert list(load_tasks(["beasts"], include_path=tmp_path).tasks) == ["beasts"]
    assert list(load_tasks(["animal?", "beasts"], include_path=tmp_path).tasks) == [
        "animals",
        "beasts",
    ]
    assert list(load_tasks(["mine"], include_path=[tmp_path]).tasks) == ["animals", "beasts"]


def test_the_cards_tasks_are_lm_evals() -> None:
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    assert set(card_tasks(allow_code=True)) <= set(index)
    assert set(card_tasks(allow_code=True)) - set(card_tasks(allow_code=False)) == set(CODE_TASKS)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_data_of_other_kinds(tmp_path: Path, kind: str) -> None:
    import pyarrow
    from pyarrow import csv, parquet

    table = pyarrow.table({"asked": ["a", "b"], "right": [0, 1]})
    write = csv.write_csv if kind == "csv" else parquet.write_table
    write(table, tmp_path / f"rows.{kind}")
    write_task(
        tmp_path,
        "animals",
        dataset_path=kind,
        dataset_kwargs={"data_files": {"test": f"rows.{kind}"}},
        training_split=None,
        fewshot_split=None,
        doc_to_choice=["x", "y"],
    )
    assert len(load_tasks([str(tmp_path)]).tasks["animals"].eval_docs) == 2


def test_data_beside_the_file_goes_before_data_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = write_task(tmp_path / "mine", "animals")
    (tmp_path / "here/animals.jsonl").write_text(json.dumps(ANIMALS[0]) + "\n")
    assert len(load_tasks([str(path)]).tasks["animals"].eval_docs) == 6
    (tmp_path / "mine/animals.jsonl").unlink()
    assert len(load_tasks([str(path)]).tasks["animals"].eval_docs) == 1


def test_a_group_keeps_its_members_and_its_mean(tmp_path: Path) -> None:
    write_task(tmp_path, "animals")
    write_task(tmp_path, "beasts")
    group = {
        "group": "all_of_them",
        "task": ["animals", "beasts"],
        "aggregate_metric_list": [{"metric": "acc", "filter_list": "none"}],
    }
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group))
    loaded = load_tasks([str(tmp_path)])
    assert loaded.requested == {str(tmp_path): ("animals", "beasts")}
    assert loaded.group_map == {"all_of_them": ["animals", "beasts"]}
    results = _answered(loaded, lambda context, target: (-1.0 * (target != " ox"), False))
    assert results["groups"]["all_of_them"]["acc,none"] == pytest.approx(1 / 3)


def test_requests_are_the_same_before_each_arm(tmp_path: Path) -> None:
    write_task(tmp_path, "animals", num_fewshot=2)
    loaded = load_tasks([str(tmp_path)], seed=3)
    first = _requests(loaded)
    assert first == _requests(loaded)
    assert first == _requests(load_tasks([str(tmp_path)], seed=3))
    assert first != _requests(load_tasks([str(tmp_path)], seed=4))


def _shots(loaded: LoadedTasks) -> dict[str, int]:
    return {name: task.config.num_fewshot for name, task in loaded.tasks.items()}


def test_shots_follow_lm_evals_rule(tmp_path: Path) -> None:
    for name, own in (("none", None), ("zero", 0), ("two", 2)):
        write_task(tmp_path, name, num_fewshot=own)
    plain = load_tasks([str(tmp_path)])
    assert _shots(plain) == {"none": 0, "two": 2, "zero": 0}
    asked = load_tasks([str(tmp_path)], num_fewshot=3)
    assert _shots(asked) == {"none": 3, "two": 3, "zero": 0}
    assert asked.notes == ("task zero keeps 0 shots, which its file sets",)
    each = load_tasks(["none", "two"], include_path=tmp_path, num_fewshot={"two": 1})
    assert _shots(each) == {"none": 0, "two": 1}


def _refused(names: list[str], **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_tasks(names, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_name_is_told_with_its_neighbours() -> None:
    assert "task hellaswga: neither known" in (line := _refused(["hellaswga"]))
    assert "did you mean hellaswag" in line
    line = _refused(["hellaswga", "piqa", "boolqq"])
    assert "neither known to lm-eval nor a file or directory, nor is boolqq; did you mean" in line


def test_data_on_a_hub_that_is_not_there_is_told() -> None:
    line = _refused(["piqa"])
    assert "task piqa: its data baber/piqa is not on this disk" in line
    assert "HF_DATASETS_OFFLINE is set" in line
    assert "datasets.load_dataset('baber/piqa')" in line
    assert "; nor can be opened: boolq, gsm8k; run python" in _refused(["piqa", "boolq", "gsm8k"])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"doc_to_text": "{{absent}}"}, "template cannot be filled ('absent' is undefined)"),
        ({"doc_to_text": "{{asked"}, "template cannot be filled"),
        ({"test_split": "absent"}, "no 'absent'"),
        ({"doc_to_target": "rihgt"}, "first question is 'rihgt', none of its 3 choices"),
        ({"doc_to_image": "asked"}, "pictures or sounds"),
        ({"unsafe_code": True}, "--allow-code"),
        ({"num_fewshot": 6, "fewshot_split": "test"}, "6 shots of 5 examples"),
        ({"num_fewshot": 9}, "9 shots of 6 examples"),
        ({"metric_list": [{"metric": "acc"}], "output_type": "no_such"}, "no_such"),
        ({"dataset_path": "reader.py"}, "read by a program (reader.py)"),
        ({"dataset_kwargs": {"data_files": "no.jsonl"}}, "no.jsonl is not in"),
        ({"dataset_path": "json", "dataset_kwargs": {"data_files": "empty.jsonl"}}, "no rows"),
        ({"class": "utils.Task"}, "runs Python code (class)"),
        ({"custom_dataset": "utils.rows"}, "runs Python code (custom_dataset)"),
        ({"dataset_path": "no/such", "dataset_kwargs": None}, "its data no/such is not on"),
    ],
)
def test_what_is_wrong_with_a_task_is_told(
    tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    path = write_task(tmp_path, "animals", **settings)
    line = _refused([str(path)])
    assert told in line
    assert "animals" in line


def test_no_questions_are_told(tmp_path: Path) -> None:
    path = write_task(tmp_path, "animals", [])
    assert "holds no rows" in _refused([str(path)])


@pytest.mark.parametrize(
    "text",
    [
        *("task: [", "task: x\n  y: z", "- 1\n", "include: no.yaml\n", "include: 5\n", "\0"),
        *(f"include: {'x' * 300}\n", "include: [own, 5]\n", 'include: "\\0"\n'),
        *("tag: 5\n", "tag: [[1]]\n", "task: &a [*a]\n"),
    ],
)
def test_a_broken_file_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    assert f"{tmp_path / 'broken.yaml'}: not a task file" in _refused([str(tmp_path)])


def test_one_task_in_two_files_is_refused(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        write_task(tmp_path / place, "animals")
    names = [str(tmp_path / place) for place in ("a", "b")]
    told = _refused(names)
    assert "task animals: is in" in told
    assert "a/animals.yaml and in" in told
    assert list(load_tasks(names[:1], include_path=tmp_path / "a").tasks) == ["animals"]


def test_other_names_that_cannot_be(tmp_path: Path) -> None:
    assert "no task files" in _refused([str(tmp_path)])
    assert "no tasks" in _refused([])
    path = write_task(tmp_path, "animals")
    absent = tmp_path / "absent"
    assert "mend --include-path" in _refused([str(path)], include_path=absent)
    group = {"group": "all_of_them", "task": ["animals"]}
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group))
    line = _refused(["animals", "all_of_them"], include_path=tmp_path)
    assert line.startswith("task animals: named twice, by animals and by all_of_them")


def test_python_beside_a_file_runs_with_leave_alone(tmp_path: Path) -> None:
    path = write_task(tmp_path, "animals")
    (tmp_path / "own.py").write_text(
        "import pathlib\n(pathlib.Path(__file__).parent / 'ran').touch()\n"
        "def text(doc):\n    return doc['asked'].upper()\n"
    )
    with path.open("a") as stream:
        stream.write("doc_to_text: !function own.text\n")
    including = tmp_path / "including.yaml"
    including.write_text("include: animals.yaml\ntask: others\n")
    for each in (path, including):
        assert "runs Python code (!function own.text, line" in _refused([str(each)])
    assert not (tmp_path / "ran").exists()
    loaded = load_tasks([str(path)], allow_code=True)
    assert loaded.tasks["animals"].doc_to_text(ANIMALS[0]) == "WHICH IS NUMBER 0?"


def test_trust_in_remote_code_is_never_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    path = write_task(tmp_path, "animals")
    task = yaml.safe_load(path.read_text())
    task["dataset_kwargs"]["trust_remote_code"] = True
    path.write_text(yaml.safe_dump(task))
    seen: list[dict[str, Any]] = []
    load = datasets.load_dataset

    def spied(*names: Any, **options: Any) -> Any:
        seen.append(options)
        return load(*names, **options)

    monkeypatch.setattr(datasets, "load_dataset", spied)
    load_tasks([str(path)])
    assert seen
    assert all("trust_remote_code" not in options for options in seen)


def test_silence_is_put_back() -> None:
    import datasets
    import lm_eval.api.task as lm_eval_task

    logger, bar = logging.getLogger("lm_eval"), lm_eval_task.tqdm
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    with quiet():
        assert logger.level == logging.ERROR
        assert datasets.are_progress_bars_disabled()
    assert (logger.level, datasets.are_progress_bars_disabled()) == (level, bars)
    with pytest.raises(DataError), quiet():
        raise DataError("a task's")
    assert (logger.level, datasets.are_progress_bars_disabled()) == (level, bars)
    assert lm_eval_task.tqdm is bar


def test_a_task_file_that_is_not_there_is_told_without_a_look_at_all_tasks() -> None:
    assert "nowhere/own.yaml: no such file" in _refused(["nowhere/own.yaml"])


def test_a_template_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.utils import env

    opened: list[str] = []
    compile_template = jinja2.Environment.compile

    def seen(self: Any, source: Any, *rest: Any, **options: Any) -> Any:
        opened.append(str(source))
        return compile_template(self, source, *rest, **options)

    monkeypatch.setattr(jinja2.Environment, "compile", seen)
    template = f"{{{{asked}}}} {tmp_path.name}"  # which no other test has compiled
    write_task(tmp_path, "animals", doc_to_text=template)
    with compiled_once():
        requests = _requests(load_tasks([str(tmp_path / "animals.yaml")]))
    assert requests[0][0] == f"Which is number 0? {tmp_path.name}"
    assert opened.count(template) == 1
    assert "from_string" not in vars(env)
    with pytest.raises(jinja2.TemplateSyntaxError), compiled_once():
        env.from_string("{{")
    assert "from_string" not in vars(env)
