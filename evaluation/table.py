"""An evaluation as text: a row a task and arm, the suite's table, and what each arm was."""

from __future__ import annotations

from collections.abc import Iterator

from common.table import table
from results.evaluation import (
    SPARSITY,
    ColumnScore,
    Evaluation,
    EvaluationArm,
    EvaluationTask,
    is_relative,
)

_NONE = "–"


def evaluation_table(result: Evaluation) -> str:
    """Return what a reader of the terminal wants: the suite's table, tasks, arms and notes.

    Differences are to the first arm, question by question, ± their standard error; `changed` is
    the share of questions whose answer is another one, right or wrong.
    """
    parts = [_columns(result)] if result.columns else []
    parts += [_tasks(result), _arms(result), _told(result)]
    return "\n\n".join(part for part in parts if part)


def _tasks(result: Evaluation) -> str:
    rows = [
        row
        for task in result.tasks
        for number, arm in enumerate(result.arms)
        for row in _row(result, task, arm, first=number == 0)
    ]
    header = ["task", "metric", "arm", "score", "±", "difference", "±", "changed %", "n"]
    return table(header, rows)


def _row(
    result: Evaluation, task: EvaluationTask, arm: EvaluationArm, *, first: bool
) -> Iterator[list[str]]:
    score = result.score(task, arm.name)
    label = [task.name, task.metric] if first else ["", ""]
    if score is None:
        yield [*label, arm.name, _NONE, "", "", "", "", ""]
        return
    found = result.difference(task.name, arm.name)
    growth, error, changed = ("", "", "")
    if found is not None:
        growth, error = f"{100 * found.difference:+.2f}", _percent(found.standard_error)
        changed = _percent(found.changed)
    if result.shares(task):
        own = [f"{100 * score.value:.2f}", _percent(score.standard_error)]
    else:
        own = [f"{score.value:,.6g}", _plain(score.standard_error)]
        if found is not None and is_relative(task.metric):
            growth = f"{growth} %"
        elif found is not None:
            growth, error = f"{found.difference:+.4f}", _plain(found.standard_error)
    yield [*label, arm.name, *own, growth, error, changed, f"{score.questions}"]


def _columns(result: Evaluation) -> str:
    titles = list(dict.fromkeys(each.column for each in result.columns))
    header = ["model", f"{SPARSITY} %", *titles]
    rows = []
    for arm in result.arms:
        cells = {each.column: each for each in result.columns if each.arm == arm.name}
        sparsity = _NONE if arm.sparsity is None else f"{100 * arm.sparsity:.2f}"
        rows.append([arm.name, sparsity, *(_score(cells[title]) for title in titles)])
        if any(each.difference is not None for each in cells.values()):
            rows.append(["  difference", "", *(_growth(cells[title]) for title in titles)])
    for row in result.published:
        known = [row.percent.get(title) for title in (SPARSITY, *titles)]
        rows.append([f"{row.name} (card)", *(_NONE if k is None else f"{k:.2f}" for k in known)])
    return table(header, rows)


def _score(cell: ColumnScore) -> str:
    if cell.percent is None:
        return _NONE
    error = "" if cell.standard_error is None else f" ± {cell.standard_error:.2f}"
    return f"{cell.percent:.2f}{error}"


def _growth(cell: ColumnScore) -> str:
    if cell.difference is None:
        return ""
    error = "" if cell.difference_error is None else f" ± {cell.difference_error:.2f}"
    return f"{cell.difference:+.2f}{error}"


def _arms(result: Evaluation) -> str:
    header = ["arm", "sparsity %", "type", "device", "requests", "seconds", "of"]
    rows = [
        [
            arm.name,
            _NONE if arm.sparsity is None else f"{100 * arm.sparsity:.2f}",
            arm.element_type,
            arm.device,
            f"{arm.requests}",
            f"{arm.seconds:.1f}",
            arm.model if arm.predictors is None else f"{arm.model} with {arm.predictors}",
        ]
        for arm in result.arms
    ]
    return table(header, rows)


def _told(result: Evaluation) -> str:
    text, number = result.bos
    few = f"; at most {result.limit:g} a task" if result.limit is not None else ""
    lines = [
        f"every request begins with one {text!r} (id {number}){few}; differences are to "
        f"{result.arms[0].name}, of the same questions, ± standard errors",
    ]
    if result.unfinished:
        lines.append(f"unfinished: {', '.join(result.unfinished)}")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}"
