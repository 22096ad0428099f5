"""Tasks are opened before any model, with what is wrong with them told in one line."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from local_tasks import ANIMALS, made_up_model, write_task

from common.errors import DataError
from evaluation.tasks.loading import (
    LoadedTasks,
    answer_of,
    chance_of,
    load_tasks,
    primary_metric,
)
from evaluation.tasks.quiet import quiet


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="module", autouse=True)
def _one_index() -> Iterator[None]:
    """Read lm-eval's own 14,000 task files once, not for each test."""
    import lm_eval.tasks.manager as manager

    own, known = manager.TaskIndex.build, dict[str, Any]()

    def build(paths: Iterable[Path], **options: Any) -> dict[str, Any]:
        index: dict[str, Any] = {}
        for path in paths:
            if Path(path) == Path(manager.__file__).parent:
                known.update({} if known else own([path], **options))
                index |= copy.deepcopy(known)
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
    "text", ["task: [", "task: x\n  y: z", "- 1\n", "include: no.yaml\n", "\0"]
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


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> LoadedTasks:
    directory = tmp_path_factory.mktemp("animals")
    mutual = [{"metric": "acc_mutual_info", "aggregation": "mean", "higher_is_better": True}]
    bytes_ = [{"metric": "acc_bytes", "aggregation": "mean", "higher_is_better": True}]
    write_task(directory, "animals")
    write_task(directory, "hellaswag_mine")
    write_task(directory, "by_information", metric_list=mutual)
    write_task(directory, "by_bytes", metric_list=bytes_)
    return load_tasks([str(directory)])


_LIKELIHOODS = st.lists(st.floats(-50, -1e-3, allow_nan=False), min_size=6, max_size=6, unique=True)


@settings(max_examples=60, deadline=None)
@given(likelihoods=_LIKELIHOODS, right=st.integers(0, 2))
@pytest.mark.parametrize("name", ["animals", "hellaswag_mine", "by_information", "by_bytes"])
def test_an_answer_is_right_exactly_where_lm_eval_says_so(
    animals: LoadedTasks, name: str, likelihoods: list[float], right: int
) -> None:
    task = animals.tasks[name]
    doc = {**ANIMALS[0], "right": right, "among": ["ox", "wíld goose", "hen"]}
    count = 6 if name == "by_information" else 3
    answers = [(each, False) for each in likelihoods[:count]]
    metric, _, better = primary_metric(task)
    assert better
    scored = task.process_results(doc, answers)[metric]
    assert (answer_of(task, doc, {"filtered_resps": answers}) == right) == bool(scored)


def test_primary_metrics(animals: LoadedTasks) -> None:
    found = {name: primary_metric(task)[0] for name, task in animals.tasks.items()}
    assert found == {
        "animals": "acc",
        "by_bytes": "acc_bytes",
        "by_information": "acc_mutual_info",
        "hellaswag_mine": "acc_norm",
    }
    assert chance_of(animals.tasks["animals"]) == pytest.approx(1 / 3)


def test_chance_is_a_mean_over_questions(tmp_path: Path) -> None:
    rows = [{"asked": "?", "among": list("abcd"[:count]), "right": 0} for count in (2, 4)]
    write_task(tmp_path, "animals", rows)
    loaded = load_tasks([str(tmp_path)])
    assert chance_of(loaded.tasks["animals"]) == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_answers_of_the_other_kinds(tmp_path: Path) -> None:
    mean = {"aggregation": "mean", "higher_is_better": True}
    common: dict[str, Any] = {"doc_to_choice": None, "doc_to_target": "{{asked}}"}
    write_task(
        tmp_path,
        "a",
        output_type="loglikelihood",
        metric_list=[{"metric": "acc", **mean}],
        **common,
    )
    words = [
        {
            "metric": "word_perplexity",
            "aggregation": "weighted_perplexity",
            "higher_is_better": False,
        }
    ]
    write_task(tmp_path, "b", output_type="loglikelihood_rolling", metric_list=words, **common)
    write_task(
        tmp_path,
        "c",
        output_type="generate_until",
        generation_kwargs={"until": ["\n"]},
        filter_list=[
            {
                "name": "bare",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
        metric_list=[{"metric": "exact_match", **mean}],
        **common,
    )
    loaded = load_tasks([str(tmp_path)])

    def answer(*arguments: Any) -> Any:
        if len(arguments) == 1:
            return -7.0
        return (
            " Which is number 2? "
            if isinstance(arguments[1], dict)
            else (-1.0, "3" in arguments[1])
        )

    results = _answered(loaded, answer)
    answers = {
        name: [answer_of(task, sample["doc"], sample) for sample in results["samples"][name]]
        for name, task in loaded.tasks.items()
    }
    assert answers == {
        "a": [False, False, False, True, False, False],
        "b": [None] * 6,
        "c": ["Which is number 2?"] * 6,
    }
    assert [primary_metric(task) for task in loaded.tasks.values()] == [
        ("acc", "none", True),
        ("word_perplexity", "none", False),
        ("exact_match", "bare", True),
    ]
    assert {chance_of(task) for task in loaded.tasks.values()} == {None}
    assert results["results"]["a"]["acc,none"] == pytest.approx(1 / 6)
    assert results["results"]["c"]["exact_match,bare"] == pytest.approx(1 / 6)
