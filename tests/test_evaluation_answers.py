"""What an answer is, whether it is right, and by which metric: as lm-eval says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_tasks import ANIMALS, made_up_model, write_task

from evaluation.tasks.loading import (
    LoadedTasks,
    answer_of,
    chance_of,
    load_tasks,
    primary_metric,
)
from evaluation.tasks.quiet import quiet


def _answered(loaded: LoadedTasks, answer: Any) -> Any:
    from lm_eval.evaluator import evaluate

    loaded.reseed()
    with quiet():
        return evaluate(made_up_model(answer), loaded.task_dict, bootstrap_iters=0)


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
