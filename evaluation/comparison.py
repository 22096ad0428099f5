"""How answers differ: paired, question by question, which tells more than two accuracies.

An arm that changes few answers is compared over those questions alone in effect: all others
differ by nothing, so the error of a paired difference is far smaller than those of both scores.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from results.evaluation import ColumnScore, Difference

Weighted = tuple[float, float]
"""A log-likelihood and how much it is of, as lm-eval's perplexities have it."""


@dataclass(frozen=True)
class Answered:
    """A question as an arm answered it.

    Attributes:
        value: of the metric that tables show: a number, or `Weighted`; None where a single question
            has none (F1, BLEU).
        answer: what was answered; None where nothing is (perplexities).
    """

    value: float | Weighted | None
    answer: Hashable | None


@dataclass(frozen=True)
class Growth:
    """A mean and its standard error, None of a single question."""

    mean: float
    error: float | None


def mean_growth(values: Sequence[float]) -> Growth:
    """Return the mean of how much each question's value grew, and its standard error."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Growth(mean, None)
    scatter = math.fsum((value - mean) ** 2 for value in values)
    return Growth(mean, math.sqrt(scatter / (count - 1) / count))


def perplexity_growth(first: Sequence[Weighted], other: Sequence[Weighted]) -> Growth:
    """Return the relative growth of exp(-sum of log-likelihoods / sum of weights).

    Its error is that of the growth's logarithm, from how texts differ.
    """
    growth = _fall(first, other, [each[1] for each in first])
    return Growth(math.expm1(growth.mean), growth.error)


def bits_growth(first: Sequence[Weighted], other: Sequence[Weighted]) -> Growth:
    """Return the relative growth of -sum of log-likelihoods, and its standard error."""
    return _fall(first, other, [-each[0] for each in first])


def _fall(first: Sequence[Weighted], other: Sequence[Weighted], weights: Sequence[float]) -> Growth:
    """Return how far log-likelihoods fall by weight, and the error of this ratio."""
    weight = math.fsum(weights)
    falls = [a[0] - b[0] for a, b in zip(first, other, strict=True)]
    fall = math.fsum(falls) / weight
    scatter = math.fsum((own - fall * each) ** 2 for own, each in zip(falls, weights, strict=True))
    return Growth(fall, math.sqrt(scatter) / weight if len(first) > 1 else None)


def compare(
    task: str,
    arm: str,
    first: Mapping[int, Answered],
    other: Mapping[int, Answered],
    *,
    bits: bool = False,
    whole: float = 0.0,
) -> Difference:
    """Compare an arm's answers to a task with the first arm's.

    Args:
        task: its name.
        arm: whose answers the others are.
        first: by number of the question.
        other: of the same questions.
        bits: log-likelihoods with weights make bits, not a perplexity.
        whole: difference of both scores, which counts where questions have no values.
    """
    pairs = [(first[number], other[number]) for number in sorted(first)]
    values: list[tuple[Any, Any]] = [(a.value, b.value) for a, b in pairs]
    if any(value is None for pair in values for value in pair):
        growth = Growth(whole, None)
    elif isinstance(values[0][0], tuple):
        growth = (bits_growth if bits else perplexity_growth)(*zip(*values, strict=True))
    else:
        growth = mean_growth([b - a for a, b in values])
    answers = [(a.answer, b.answer) for a, b in pairs if a.answer is not None]
    changed = sum(a != b for a, b in answers) / len(answers) if answers else None
    rightness = all(value in (0, 1) for pair in values for value in pair)
    return Difference(
        task=task,
        arm=arm,
        difference=growth.mean,
        standard_error=growth.error,
        changed=changed,
        became_right=sum(b > a for a, b in values) if rightness else None,
        became_wrong=sum(b < a for a, b in values) if rightness else None,
        questions=len(pairs),
    )


@dataclass(frozen=True)
class Part:
    """A task's part of a column, in one arm.

    Attributes:
        score: of the metric, with its standard error.
        growth: over the first arm's, paired; None for that itself.
    """

    score: Growth
    growth: Growth | None


def column(title: str, arm: str, tasks: Sequence[str], parts: Sequence[Part | None]) -> ColumnScore:
    """Return the mean over a column's tasks, each counting as much, in per cent.

    Args:
        title: of the column.
        arm: whose.
        tasks: that it is the mean of.
        parts: of each task; None where it is missing, and then the column is.
    """
    found = [part for part in parts if part is not None]
    if len(found) < len(tasks) or not found:
        return ColumnScore(column=title, arm=arm, percent=None, tasks=tuple(tasks))
    scores = _mean([part.score for part in found])
    growths = [part.growth for part in found if part.growth is not None]
    growth = _mean(growths) if growths else None
    return ColumnScore(
        column=title,
        arm=arm,
        percent=100 * scores.mean,
        standard_error=_percent(scores.error),
        difference=None if growth is None else 100 * growth.mean,
        difference_error=None if growth is None else _percent(growth.error),
        tasks=tuple(tasks),
    )


def average(title: str, arm: str, columns: Sequence[ColumnScore]) -> ColumnScore:
    """Return the mean over columns, each counting as much; missing if one is."""
    tasks = tuple(task for each in columns for task in each.tasks)
    scores = [each.percent for each in columns if each.percent is not None]
    if len(scores) < len(columns):
        return ColumnScore(column=title, arm=arm, percent=None, tasks=tasks)
    score = _mean([Growth(each.percent or 0.0, each.standard_error) for each in columns])
    growths = [each for each in columns if each.difference is not None]
    growth = _mean([Growth(each.difference or 0.0, each.difference_error) for each in growths])
    return ColumnScore(
        column=title,
        arm=arm,
        percent=score.mean,
        standard_error=score.error,
        difference=growth.mean if growths else None,
        difference_error=growth.error if growths else None,
        tasks=tasks,
    )


def pooled(growths: Sequence[tuple[Growth, int]]) -> Growth:
    """Return the mean over all questions of several tasks.

    Args:
        growths: of each task, and how many questions it has.
    """
    total = sum(count for _, count in growths)
    mean = math.fsum(each.mean * count for each, count in growths) / total
    errors = [None if each.error is None else each.error * count for each, count in growths]
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return Growth(mean, None)
    return Growth(mean, math.hypot(*known) / total)


def _mean(parts: Sequence[Growth]) -> Growth:
    """Return the mean of independent means."""
    if not parts:
        return Growth(0.0, None)
    return pooled([(part, 1) for part in parts])


def _percent(error: float | None) -> float | None:
    return None if error is None else 100 * error
