"""What an evaluation shows: scores as the pictures take them, and differences judged in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from report.figures.evaluation import ChangedBar, ChangedGroup, ScoreBar, ScoreGroup
from results.evaluation import (
    ColumnScore,
    Difference,
    Evaluation,
    EvaluationTask,
    TaskScore,
    is_relative,
    is_share,
)

MOST = 20
"""So many tasks are drawn; of more, columns or groups are."""

NAMED = 8
"""So many differences are told one by one in a sentence."""

CLEAR = 2.0
"""Standard errors beyond which a difference is called one."""

BY_CHANCE = 0.0455
"""Share of differences beyond those errors where there is none, of normally distributed ones."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A difference and what it can tell.

    Attributes:
        title: of the task or column.
        difference: arm less first arm, in `unit`.
        error: its standard error, None if unknown.
        questions: compared, None of a column.
        changed: whether any answer is another; None if unknown.
        better: whether the arm is the better one.
        unit: ` points` of scores in per cent, ` %` of a perplexity's growth, else nothing.
    """

    title: str
    difference: float
    error: float | None
    questions: int | None
    changed: bool | None
    better: bool
    unit: str

    @property
    def outcome(self) -> str:
        """`better`, `worse`, `the same`, `not seen` or `unknown`."""
        if self.difference == 0 and self.error in (0, None):
            return "the same"
        if self.error is None:
            return "unknown"
        if abs(self.difference) > CLEAR * self.error:
            return "better" if self.better else "worse"
        return "not seen"

    @property
    def differs(self) -> bool:
        """Whether there is a difference."""
        return self.outcome in ("better", "worse")

    @property
    def words(self) -> str:
        """What the outcome rests on."""
        if self.outcome == "the same":
            what = "the same answers" if self.changed is False else "the same score"
            return f"{self.title} ({what}{_of(self.questions)})"
        if self.error is None:
            what = "one question, " if self.questions == 1 else ""
            return f"{self.title} ({what}error unknown)"
        if self.differs:
            shown = f"{signed(self.difference)} ± {self.error:.2f}{self.unit}"
            return f"{self.title} ({shown}, {self.outcome})"
        who = "its questions" if self.questions is None else f"{self.questions:,} questions"
        return f"{self.title} ({who} could have shown one of {self.shown:.2f}{self.unit})"

    @property
    def shown(self) -> float:
        """The smallest difference that would have been called one."""
        return CLEAR * (self.error or 0.0)


def _of(questions: int | None) -> str:
    if questions is None:
        return ""
    return " to its one question" if questions == 1 else f" to all {questions:,} questions"


def signed(value: float) -> str:
    """Return a number of two decimals with its sign, none where it rounds to nothing."""
    text = f"{value:+.2f}".replace("-", "−")
    return text[1:] if text[1:] == "0.00" else text


def _scores(evaluation: Evaluation, task: EvaluationTask) -> list[TaskScore | None]:
    return [evaluation.score(task, arm.name) for arm in evaluation.arms]


def share_tasks(evaluation: Evaluation) -> list[EvaluationTask]:
    """Return the tasks whose metric is a share."""
    return [task for task in evaluation.tasks if evaluation.shares(task)]


def judged_tasks(evaluation: Evaluation, arm: str) -> list[Judged]:
    """Judge an arm's difference in every task that both arms answered."""
    found = ((task, evaluation.difference(task.name, arm)) for task in evaluation.tasks)
    return [
        judged_task(task, difference, share=evaluation.shares(task))
        for task, difference in found
        if difference is not None
    ]


def judged_task(task: EvaluationTask, difference: Difference, *, share: bool) -> Judged:
    """Judge the difference in a task."""
    unit = " points" if share else " %" if is_relative(task.metric) else ""
    factor, error = 100 if unit else 1, difference.standard_error
    return Judged(
        title=task.name,
        difference=factor * difference.difference,
        error=None if error is None else factor * error,
        questions=difference.questions,
        changed=None if difference.changed is None else difference.changed > 0,
        better=(difference.difference > 0) == task.higher_is_better,
        unit=unit,
    )


def judged_columns(evaluation: Evaluation, arm: str) -> list[Judged]:
    """Judge an arm's difference in every column of the suite's table."""
    return [
        Judged(
            title=score.column,
            difference=score.difference,
            error=score.difference_error,
            questions=None,
            changed=None,
            better=score.difference > 0,
            unit=" points",
        )
        for score in evaluation.columns
        if score.arm == arm and score.difference is not None
    ]


def sentences(judged: Sequence[Judged], first: str) -> list[str]:
    """Say where an arm differs from the first, and what could have been seen where it does not."""
    differing = [each.words for each in judged if each.differs]
    words = [f"Differs from {first} in {_listed(differing)}."] if differing else []
    unseen = [each for each in judged if each.outcome == "not seen"]
    if len(unseen) > NAMED:
        ends = sorted(each.shown for each in unseen)
        words.append(
            f"No difference seen in {len(unseen)} others: each could have shown one of "
            f"{ends[0]:.2f} to {ends[-1]:.2f}."
        )
    elif unseen:
        words.append(f"No difference seen in {_listed([each.words for each in unseen])}.")
    words += _rest(judged)
    if differing and len(judged) * BY_CHANCE >= 0.5:
        words.append(
            f"Of {len(judged)} that are compared about {len(judged) * BY_CHANCE:.0f} would seem to "
            "differ by chance alone."
        )
    return words


def _rest(judged: Sequence[Judged]) -> list[str]:
    kinds = {"the same": "The same", "unknown": "Nothing can be said"}
    words = []
    for outcome, opening in kinds.items():
        found = [each.words for each in judged if each.outcome == outcome]
        if len(found) > NAMED:
            words.append(f"{opening} in {len(found)} others.")
        elif found:
            words.append(f"{opening} in {_listed(found)}.")
    return words


def _listed(words: Sequence[str]) -> str:
    more = [f"and {len(words) - NAMED} more"] if len(words) > NAMED else []
    return ", ".join([*words[:NAMED], *more])


def headlines(evaluation: Evaluation) -> list[str]:
    """Return a sentence for each arm that is compared, or one if nothing is."""
    first, *others = evaluation.arms
    if not others:
        return [f"{first.name} answered {len(evaluation.tasks)} tasks; nothing is compared."]
    return [_headline(evaluation, arm.name) for arm in others]


def _headline(evaluation: Evaluation, arm: str) -> str:
    judged, first = judged_tasks(evaluation, arm), evaluation.arms[0].name
    if not judged:
        return f"{arm}: no task is compared with {first}."
    outcomes = [each.outcome for each in judged]
    return (
        f"{arm}: worse than {first} in {outcomes.count('worse')} and better in "
        f"{outcomes.count('better')} of {len(judged)} tasks, beyond {CLEAR:g} standard errors."
    )


def score_groups(evaluation: Evaluation) -> list[ScoreGroup]:
    """Return what is drawn: tasks, or of too many the columns, the groups, or the most different.

    Returns:
        Groups in the document's order; none where no metric is a share.
    """
    tasks = share_tasks(evaluation)
    if len(tasks) <= MOST:
        return [_task_group(evaluation, task) for task in tasks]
    summed = _column_groups(evaluation) or _aggregates(evaluation)
    return summed or [_task_group(evaluation, task) for task in _most_different(evaluation, tasks)]


def drawn_note(evaluation: Evaluation) -> str:
    """Say what is drawn where it is not every task; nothing where it is."""
    tasks = share_tasks(evaluation)
    if len(tasks) <= MOST:
        return ""
    if _column_groups(evaluation):
        return f"Drawn are the columns; the {len(tasks)} tasks are in a table."
    if _aggregates(evaluation):
        return f"Drawn are groups of tasks; the {len(tasks)} tasks are in a table."
    return (
        f"Drawn are {MOST} of {len(tasks)} tasks, those whose differences are the most standard "
        "errors: they look worse than all do. All are in the table."
    )


def _task_group(evaluation: Evaluation, task: EvaluationTask) -> ScoreGroup:
    chance = None if task.chance is None else 100 * task.chance
    return _group(task.name, _scores(evaluation, task), chance)


def _group(title: str, scores: Sequence[TaskScore | None], chance: float | None) -> ScoreGroup:
    bars = tuple(
        ScoreBar(
            arm=number,
            percent=100 * score.value,
            error=None if score.standard_error is None else 100 * score.standard_error,
        )
        for number, score in enumerate(scores)
        if score is not None
    )
    return ScoreGroup(title=title, chance=chance, bars=bars)


def _column_groups(evaluation: Evaluation) -> list[ScoreGroup]:
    numbers = {arm.name: number for number, arm in enumerate(evaluation.arms)}
    groups = []
    for title in column_titles(evaluation):
        found = [(numbers.get(s.arm), s) for s in evaluation.columns if s.column == title]
        bars = tuple(
            ScoreBar(arm=number, percent=score.percent, error=score.standard_error)
            for number, score in sorted(
                ((number, score) for number, score in found if number is not None),
                key=lambda each: each[0],
            )
            if score.percent is not None and 0 <= score.percent <= 100
        )
        if bars:
            groups.append(ScoreGroup(title=title, chance=None, bars=bars))
    return groups


def column_titles(evaluation: Evaluation) -> list[str]:
    """Return the titles of the suite's columns, in order."""
    return list(dict.fromkeys(score.column for score in evaluation.columns))


def column_score(evaluation: Evaluation, column: str, arm: str) -> ColumnScore | None:
    """Return an arm's score in a column, None without."""
    named = (score for score in evaluation.columns if (score.column, score.arm) == (column, arm))
    return next(named, None)


def _aggregates(evaluation: Evaluation) -> list[ScoreGroup]:
    """Return lm-eval's own groups, each in its first metric that is a share."""
    tasks = {task.name for task in evaluation.tasks}
    named = [score for score in evaluation.scores if score.task not in tasks]
    groups = []
    for title in dict.fromkeys(score.task for score in named):
        own = [score for score in named if score.task == title]
        metrics = dict.fromkeys((score.metric, score.filter) for score in own)
        for metric, used in metrics:
            found = [score for score in own if (score.metric, score.filter) == (metric, used)]
            if is_share(metric, [score.value for score in found]):
                by_arm = {score.arm: score for score in found}
                groups.append(_group(title, [by_arm.get(a.name) for a in evaluation.arms], None))
                break
    return groups


def _most_different(
    evaluation: Evaluation, tasks: Sequence[EvaluationTask]
) -> list[EvaluationTask]:
    errors = {task.name: _standard_errors(evaluation, task.name) for task in tasks}
    chosen = sorted(tasks, key=lambda task: -errors[task.name])[:MOST]
    return [task for task in tasks if task in chosen]


def _standard_errors(evaluation: Evaluation, task: str) -> float:
    found = [d for d in evaluation.differences if d.task == task and d.standard_error]
    return max((abs(d.difference) / (d.standard_error or 1.0) for d in found), default=0.0)


def changed_groups(evaluation: Evaluation) -> list[ChangedGroup]:
    """Return the changed answers that are drawn; none where nothing is compared.

    Those of the tasks that `score_groups` draws; of more than `MOST` tasks all together.
    """
    tasks = [task.name for task in evaluation.tasks]
    shown = tasks if len(tasks) <= MOST else []
    groups = [ChangedGroup(title=task, bars=_changed(evaluation, [task])) for task in shown]
    if not shown:
        groups = [ChangedGroup(title="all tasks", bars=_changed(evaluation, tasks))]
    return [group for group in groups if group.bars]


def _changed(evaluation: Evaluation, tasks: Sequence[str]) -> tuple[ChangedBar, ...]:
    wanted, bars = set(tasks), []
    for number, arm in enumerate(evaluation.arms):
        own = [d for d in evaluation.differences if d.arm == arm.name and d.task in wanted]
        known = [(d, d.changed) for d in own if d.changed is not None and d.questions]
        if known:
            bars.append(_changed_bar(number, known))
    return tuple(bars)


def _changed_bar(number: int, known: Sequence[tuple[Difference, float]]) -> ChangedBar:
    questions = sum(difference.questions for difference, _ in known)
    share = sum(difference.questions * changed for difference, changed in known) / questions
    rights = [difference.became_right for difference, _ in known]
    wrongs = [difference.became_wrong for difference, _ in known]
    counted = None not in rights and None not in wrongs
    return ChangedBar(
        arm=number,
        percent=100 * share,
        right=sum(filter(None, rights)) if counted else None,
        wrong=sum(filter(None, wrongs)) if counted else None,
        questions=questions,
    )
