"""A made-up evaluation: what arms answered that never ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from made_up_results import MACHINE, Document

Answers = list[npt.NDArray[np.bool_]]

ARMS = ("dense", "predictors", "q4_0")
_KINDS = ("dense", "predictors", "engine")
_SPARSITIES = (0.9312, 0.9401, None)
_LOST, _GAINED = (0.0, 0.02, 0.12), (0.0, 0.02, 0.05)
"""Share of the first arm's right answers that an arm gets wrong, and of its wrong ones right."""

TASKS = {"piqa": 0.5, "hellaswag": 0.25, "gsm8k": None}
"""Chance by task."""


def evaluation(
    tasks: Sequence[str] = tuple(TASKS),
    *,
    arms: int = 3,
    questions: int = 400,
    columns: bool = True,
    groups: Sequence[str] = (),
) -> Document:
    """Return an evaluation with every optional part, and a rolling perplexity beside its tasks.

    Args:
        tasks: with scores in per cent.
        arms: so many of `ARMS`.
        questions: of each task.
        columns: with a suite's table and published rows.
        groups: aggregates of all tasks.
    """
    random = np.random.default_rng(0)
    names = ARMS[:arms]
    answers = {task: _answers(random, questions) for task in tasks}
    scores = [
        _score(task, arm, answers[task][number])
        for task in tasks
        for number, arm in enumerate(names)
    ]
    means = [np.mean([answers[task][number] for task in tasks], 0) for number in range(arms)]
    scores += [_score(group, arm, means[n]) for group in groups for n, arm in enumerate(names)]
    differences = [
        _difference(task, arm, answers[task], number)
        for task in tasks
        for number, arm in enumerate(names)
        if number
    ]
    return {
        "kind": "psp.evaluation",
        "schema_version": 1,
        "created": "2026-11-27T18:00:00Z",
        "suite": "card" if columns else None,
        "seed": 1234,
        "limit": 400,
        "bos": ["<s>", 1],
        "chat_template": "none",
        "machine": MACHINE,
        "versions": dict.fromkeys(("psp", "lm_eval", "python", "torch", "transformers"), "0.4.13"),
        "arms": [_arm(number, arm) for number, arm in enumerate(names)],
        "tasks": [*(_task(task, questions) for task in tasks), _rolling()],
        "scores": [*scores, *(_perplexity(number, arm) for number, arm in enumerate(names))],
        "differences": [*differences, *(_longer(arm) for arm in names[1:])],
        "unfinished": ["q4_0: mbpp"],
        "columns": _columns(names) if columns else [],
        "published": [_PUBLISHED] if columns else [],
        "notes": ["gsm8k: 3 answers had no number in them"],
    }


_PUBLISHED: Document = {
    "name": "Made-up-7B (card)",
    "percent": {"Average Sparsity": 89.32, "Average": 38.46, "Commonsense": 66.99, "BBH": 31.08},
}


def _answers(random: np.random.Generator, questions: int) -> Answers:
    """Return for each arm whether its answers are right."""
    first = random.random(questions) < 0.6
    spoilt, mended = random.random((2, questions))
    return [
        np.where(first, spoilt >= lost, mended < gained)
        for lost, gained in zip(_LOST, _GAINED, strict=True)
    ]


def _error(values: npt.NDArray[Any]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def _arm(number: int, name: str) -> Document:
    return {
        "name": name,
        "kind": _KINDS[number],
        "model": "models/made-up-7b",
        "model_hash": "5a" * 32,
        "predictors": "out/predictors" if name == "predictors" else None,
        "predictors_hash": "6b" * 32 if name == "predictors" else None,
        "threshold": 0.5 if name == "predictors" else None,
        "element_type": "float16",
        "device": "cpu",
        "batch_size": 8,
        "sparsity": _SPARSITIES[number],
        "seconds": 120.5 + number,
        "requests": 3200,
        "tokens": 250_000,
    }


def _task(name: str, questions: int) -> Document:
    return {
        "name": name,
        "version": "1.0",
        "output_type": "generate_until" if TASKS.get(name, 1) is None else "multiple_choice",
        "shots": 8 if name == "gsm8k" else 0,
        "questions": questions,
        "of_questions": 10 * questions,
        "metric": "acc",
        "filter": "none",
        "higher_is_better": True,
        "requests_hash": "7c" * 32,
        "chance": TASKS.get(name, 0.25),
        "first_prompt": f"Question of {name}:\n  which <b>?\nAnswer:",
    }


def _rolling() -> Document:
    rolling = {"metric": "word_perplexity", "higher_is_better": False, "chance": None}
    kind = {"output_type": "loglikelihood_rolling", "requests_hash": "8d" * 32}
    return _task("text", 64) | rolling | kind


def _score(task: str, arm: str, right: npt.NDArray[Any]) -> Document:
    return {
        "task": task,
        "arm": arm,
        "metric": "acc",
        "filter": "none",
        "value": float(np.mean(right)),
        "standard_error": _error(right),
        "questions": len(right),
    }


def _perplexity(number: int, arm: str) -> Document:
    known = {"metric": "word_perplexity", "filter": "none", "standard_error": None}
    return {"task": "text", "arm": arm, "value": 8.1 + number / 4, "questions": 64, **known}


def _difference(task: str, arm: str, answers: Answers, number: int) -> Document:
    first, own = answers[0], answers[number]
    grown = own.astype(float) - first
    return {
        "task": task,
        "arm": arm,
        "difference": float(np.mean(grown)),
        "standard_error": _error(grown),
        "changed": min(1.0, float(np.mean(own != first)) + 0.01),
        "became_right": int((own & ~first).sum()),
        "became_wrong": int((first & ~own).sum()),
        "questions": len(own),
    }


def _longer(arm: str) -> Document:
    known = {"changed": None, "became_right": None, "became_wrong": None, "questions": 64}
    return {"task": "text", "arm": arm, "difference": 0.031, "standard_error": 0.01, **known}


def _columns(arms: Sequence[str]) -> list[Document]:
    columns = {"Average": 40.0, "Code": None, "Commonsense": 61.5, "GSM8K": 11.0}
    return [
        {
            "column": title,
            "arm": arm,
            "percent": None if percent is None else percent - number,
            "standard_error": None if percent is None else 1.2,
            "difference": None if percent is None or not number else -float(number),
            "difference_error": None if percent is None or not number else 0.6,
            "tasks": ["piqa", "hellaswag"],
        }
        for title, percent in columns.items()
        for number, arm in enumerate(arms)
    ]
