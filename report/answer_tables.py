"""The tables of an evaluation: tasks, metrics that are no shares, the suite's, and inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from report.answers import (
    column_score,
    column_titles,
    judged_columns,
    judged_task,
    judged_tasks,
    sentences,
    share_tasks,
    signed,
)
from report.words import NOTHING, per_cent
from results.evaluation import (
    ColumnScore,
    Difference,
    Evaluation,
    EvaluationArm,
    EvaluationTask,
)

Row = list[str]

_SPARSITY = "sparsity"
"""A published column with this in its title is beside the arms' own."""


@dataclass(frozen=True, kw_only=True)
class TaskTable:
    """One task.

    Attributes:
        task: which.
        rows: one an arm that answered it.
    """

    task: EvaluationTask
    rows: list[Row]


@dataclass(frozen=True, kw_only=True)
class SuiteTable:
    """A suite's table.

    Attributes:
        titles: of its columns, the first is the arm's or model's.
        arms: a row an arm, in per cent.
        differences: a row an arm, in percentage points to the first.
        published: rows of the card.
    """

    titles: Row
    arms: list[Row]
    differences: list[Row]
    published: list[Row]


def share_tables(evaluation: Evaluation) -> list[TaskTable]:
    """Return the tasks whose metric is told in per cent.

    Rows hold arm, sparsity, score, difference, what it says, changed, became right, became wrong,
    questions.
    """
    return [_table(evaluation, task, _share_row) for task in share_tasks(evaluation)]


def other_tables(evaluation: Evaluation) -> list[TaskTable]:
    """Return the tasks whose metric is no share.

    Rows hold arm, score, difference, what it says, questions.
    """
    others = [task for task in evaluation.tasks if not evaluation.shares(task)]
    return [_table(evaluation, task, _other_row) for task in others]


_MakeRow = Callable[[Evaluation, EvaluationTask, EvaluationArm], Row]


def _table(evaluation: Evaluation, task: EvaluationTask, row: _MakeRow) -> TaskTable:
    answered = [arm for arm in evaluation.arms if evaluation.score(task, arm.name) is not None]
    return TaskTable(task=task, rows=[row(evaluation, task, arm) for arm in answered])


def _share_row(evaluation: Evaluation, task: EvaluationTask, arm: EvaluationArm) -> Row:
    score = evaluation.score(task, arm.name)
    found = evaluation.difference(task.name, arm.name)
    return [
        arm.name,
        NOTHING if arm.sparsity is None else per_cent(arm.sparsity),
        NOTHING if score is None else _percent(score.value, score.standard_error),
        *_difference(task, found, share=True),
        NOTHING if found is None or found.changed is None else per_cent(found.changed),
        _count(None if found is None else found.became_right),
        _count(None if found is None else found.became_wrong),
        _count(None if score is None else score.questions),
    ]


def _other_row(evaluation: Evaluation, task: EvaluationTask, arm: EvaluationArm) -> Row:
    score = evaluation.score(task, arm.name)
    found = evaluation.difference(task.name, arm.name)
    count = None if score is None else score.questions
    shown = NOTHING if score is None else _plain(score.value, score.standard_error)
    return [arm.name, shown, *_difference(task, found, share=False), _count(count)]


def _difference(task: EvaluationTask, found: Difference | None, *, share: bool) -> Row:
    """Return a difference with its error, and what it says."""
    if found is None:
        return [NOTHING, ""]
    judged = judged_task(task, found, share=share)
    unit = "" if share else judged.unit
    return [_signed(judged.difference, judged.error) + unit, _SAYS[judged.outcome]]


_SAYS = {
    "better": "differs: better",
    "worse": "differs: worse",
    "the same": "the same score",
    "not seen": "none seen",
    "unknown": "unknown",
}


def _percent(share: float, error: float | None) -> str:
    return per_cent(share) if error is None else f"{per_cent(share)} ± {per_cent(error)}"


def _plain(value: float, error: float | None) -> str:
    return f"{value:,.4f}" if error is None else f"{value:,.4f} ± {error:,.4f}"


def _signed(difference: float, error: float | None) -> str:
    return signed(difference) if error is None else f"{signed(difference)} ± {error:.2f}"


def _count(number: int | None) -> str:
    return NOTHING if number is None else f"{number:,}"


def suite_table(evaluation: Evaluation) -> SuiteTable | None:
    """Return the suite's table, None of an evaluation without."""
    if not evaluation.columns:
        return None
    named = [title for row in evaluation.published for title in row.percent]
    known = dict.fromkeys([*column_titles(evaluation), *named])
    titles = [title for title in known if _SPARSITY not in title.lower()]
    arms = {arm.name: arm for arm in evaluation.arms}
    return SuiteTable(
        titles=["model", "Sparsity", *titles],
        arms=[
            [name, _own_sparsity(arm), *(_column(evaluation, t, name, _score) for t in titles)]
            for name, arm in arms.items()
        ],
        differences=[
            [name, "", *(_column(evaluation, t, name, _to_first) for t in titles)]
            for name in list(arms)[1:]
        ],
        published=[_published(row.name, row.percent, titles) for row in evaluation.published],
    )


def _own_sparsity(arm: EvaluationArm) -> str:
    return NOTHING if arm.sparsity is None else per_cent(arm.sparsity)


def _column(
    evaluation: Evaluation, title: str, arm: str, text: Callable[[ColumnScore], str]
) -> str:
    found = column_score(evaluation, title, arm)
    return NOTHING if found is None else text(found)


def _score(score: ColumnScore) -> str:
    if score.percent is None:
        return NOTHING
    error = "" if score.standard_error is None else f" ± {score.standard_error:.2f}"
    return f"{score.percent:.2f}{error}"


def _to_first(score: ColumnScore) -> str:
    return (
        NOTHING if score.difference is None else _signed(score.difference, score.difference_error)
    )


def _published(name: str, percent: dict[str, float], titles: Sequence[str]) -> Row:
    sparsity = next((each for title, each in percent.items() if _SPARSITY in title.lower()), None)
    values = [sparsity, *map(percent.get, titles)]
    return [name, *(NOTHING if each is None else f"{each:.2f}" for each in values)]


def judgements(evaluation: Evaluation) -> list[tuple[str, list[str]]]:
    """Return for each arm but the first what its differences say: of tasks, then of columns."""
    first, *others = evaluation.arms
    return [
        (
            arm.name,
            [
                *sentences(judged_tasks(evaluation, arm.name), first.name),
                *(f"Columns: {line}" for line in _column_lines(evaluation, arm.name)),
            ],
        )
        for arm in others
    ]


def _column_lines(evaluation: Evaluation, arm: str) -> list[str]:
    lines = sentences(judged_columns(evaluation, arm), evaluation.arms[0].name)
    return [line[0].lower() + line[1:] for line in lines]


def asked_rows(evaluation: Evaluation) -> list[Row]:
    """Return a row for each task: what was asked and the hash of it."""
    return [
        [
            task.name,
            task.version,
            task.output_type,
            str(task.shots),
            f"{task.questions:,} of {task.of_questions:,}",
            f"{task.metric}, {task.filter}",
            task.requests_hash,
        ]
        for task in evaluation.tasks
    ]
