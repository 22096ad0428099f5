"""The document of an evaluation."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from common.files import sha256
from common.version import package_version, tool_version
from evaluation.answers import Answer, Answers
from evaluation.arms import Arm, ArmFacts, CheckedModel
from evaluation.comparison import Growth, Part, average, column, compare, pooled
from evaluation.scoring import Questions, Scored
from evaluation.settings import EvaluateConfig
from evaluation.suites.card import AVERAGE
from evaluation.suites.suite import Suite
from evaluation.tasks.loading import LoadedTasks, chance_of, primary_metric
from powerinfer_bridge.benchmark.setup import this_machine
from results.evaluation import (
    ColumnScore,
    Difference,
    Evaluation,
    EvaluationArm,
    EvaluationTask,
    EvaluationVersions,
    TaskScore,
    is_relative,
)

_PROMPT_CHARACTERS = 20_000


@dataclass(frozen=True)
class Asked:
    """An arm that has been asked.

    Attributes:
        arm: which.
        facts: what it was.
        answers: all that it gave.
        size: requests at once in the end.
        known: answers by kind and key.
        failed: tasks that an error left open.
    """

    arm: Arm
    facts: ArmFacts
    answers: Answers
    size: int
    known: Mapping[tuple[str, str], Answer]
    failed: tuple[str, ...]


def document(
    config: EvaluateConfig,
    model: CheckedModel,
    suite: Suite,
    tasks: LoadedTasks,
    questions: Sequence[Questions],
    asked: Sequence[Asked],
    scored: Sequence[Scored],
    notes: Sequence[str],
) -> Evaluation:
    """Return all that was measured.

    Args:
        config: settings.
        model: the first checkpoint.
        suite: what was asked for.
        tasks: that were asked.
        questions: of them.
        asked: arms, in order.
        scored: of each.
        notes: lines that a reader must know.
    """
    from evaluation.language_model import chat_of

    tokenizer = model.tokenizer
    names = [each.arm.name for each in asked]
    differences = [
        each
        for arm, found in zip(names[1:], scored[1:], strict=True)
        for each in _differences(arm, tasks, scored[0], found)
    ]
    return Evaluation(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        suite=config.suite,
        seed=config.seed,
        limit=config.limit,
        bos=(tokenizer.bos_text, tokenizer.bos_id()),
        chat_template=chat_of(model) if config.apply_chat_template else "none",
        machine=this_machine().facts,
        versions=EvaluationVersions(
            psp=tool_version(),
            lm_eval=package_version("lm_eval") or "",
            python=platform.python_version(),
            torch=str(torch.__version__),
            transformers=package_version("transformers") or "",
        ),
        arms=tuple(map(_arm, asked)),
        tasks=tuple(_tasks(tasks, questions, scored[0])),
        scores=tuple(
            each for arm, found in zip(names, scored, strict=True) for each in _scores(arm, found)
        ),
        differences=tuple(differences),
        unfinished=tuple(f"{each.arm.name}: {task}" for each in asked for task in each.failed),
        columns=tuple(_columns(suite, tasks, names, scored, differences)),
        published=suite.published if config.reference else (),
        notes=tuple(notes),
    )


def _arm(asked: Asked) -> EvaluationArm:
    arm, facts, answers = asked.arm, asked.facts, asked.answers
    zeros = answers.zeros
    return EvaluationArm(
        name=arm.name,
        kind=arm.kind,
        model=str(arm.file or arm.model),
        model_hash=facts.model_hash,
        predictors=None if arm.predictors is None else str(arm.predictors),
        predictors_hash=facts.predictors_hash,
        threshold=facts.threshold,
        element_type=facts.element_type,
        device=facts.device,
        batch_size=asked.size,
        sparsity=None if zeros is None or not zeros.total else zeros.zero / zeros.total,
        seconds=answers.seconds,
        requests=len(answers.known),
        tokens=answers.tokens,
    )


def _tasks(
    tasks: LoadedTasks, questions: Sequence[Questions], scored: Scored
) -> Iterator[EvaluationTask]:
    for name, task in tasks.tasks.items():
        own = [each for each in questions if each.task == name]
        metric, filtered, better = primary_metric(task)
        yield EvaluationTask(
            name=name,
            version=str(task.VERSION),
            output_type=str(task.OUTPUT_TYPE),
            shots=int(task.get_config("num_fewshot") or 0),
            questions=len({each.doc_id for each in task.instances}),
            of_questions=len(task.eval_docs),
            metric=metric,
            filter=filtered,
            higher_is_better=better,
            requests_hash=requests_hash(own),
            chance=chance_of(task),
            first_prompt=str(own[0].arguments[0][0])[:_PROMPT_CHARACTERS],
        )


def requests_hash(questions: Sequence[Questions]) -> str:
    """Return a SHA-256 over all that a task asks, of every kind of request."""
    digests = [each.digest for each in questions]
    return digests[0] if len(digests) == 1 else sha256("".join(digests).encode())


def _scores(arm: str, scored: Scored) -> Iterator[TaskScore]:
    for task, metrics in scored.tasks.items():
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            yield TaskScore(
                task=task,
                arm=arm,
                metric=metric,
                filter=filtered,
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                questions=int(metrics.get("sample_len", scored.questions.get(task, 0))),
            )


def _differences(
    arm: str, tasks: LoadedTasks, first: Scored, found: Scored
) -> Iterator[Difference]:
    for task, answers in found.answered.items():
        if answers and first.answered.get(task):
            metric, filtered, _ = primary_metric(tasks.tasks[task])
            before, after = (each.tasks[task][f"{metric},{filtered}"] for each in (first, found))
            grown = after / before - 1 if is_relative(metric) else after - before
            bits = metric == "bits_per_byte"
            yield compare(task, arm, first.answered[task], answers, bits=bits, whole=grown)


def _columns(
    suite: Suite,
    tasks: LoadedTasks,
    arms: Sequence[str],
    scored: Sequence[Scored],
    differences: Sequence[Difference],
) -> Iterator[ColumnScore]:
    if not suite.columns:
        return
    paired = {(each.task, each.arm): each for each in differences}
    for arm, found in zip(arms, scored, strict=True):
        made = []
        for each in suite.columns:
            parts = [
                _part(name, tasks, found, {t: d for (t, a), d in paired.items() if a == arm})
                for name in each.names
            ]
            made.append(column(each.title, arm, each.names, parts))
        yield from made
        yield average(AVERAGE, arm, made)


def _part(
    name: str, tasks: LoadedTasks, scored: Scored, differences: Mapping[str, Difference]
) -> Part | None:
    """Return the part of a task or of a group of tasks."""
    leaves = tasks.requested.get(name, (name,))
    if not leaves or any(leaf not in scored.tasks for leaf in leaves):
        return None
    whole = [_leaf(leaf, tasks.tasks[leaf], scored) for leaf in leaves]
    own = [differences[leaf] for leaf in leaves if leaf in differences]
    growths = [(Growth(d.difference, d.standard_error), d.questions) for d in own]
    return Part(pooled(whole), pooled(growths) if len(growths) == len(leaves) else None)


def _leaf(name: str, task: Any, scored: Scored) -> tuple[Growth, int]:
    metric, filtered, _ = primary_metric(task)
    metrics = scored.tasks[name]
    error = metrics.get(f"{metric}_stderr,{filtered}")
    return (
        Growth(
            float(metrics[f"{metric},{filtered}"]),
            float(error) if isinstance(error, int | float) else None,
        ),
        scored.questions[name],
    )
