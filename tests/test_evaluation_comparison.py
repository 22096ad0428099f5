"""Paired differences against their formulas, and columns of a suite's table."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.comparison import (
    Answered,
    Growth,
    Part,
    average,
    bits_growth,
    column,
    compare,
    mean_growth,
    perplexity_growth,
    pooled,
)
from results.evaluation import ColumnScore

RIGHT = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), min_size=2)


@given(answers=RIGHT)
def test_differences_are_of_the_same_questions(answers: list[tuple[bool, bool, int]]) -> None:
    first = {n: Answered(float(a), 0) for n, (a, _, _) in enumerate(answers)}
    other = {n: Answered(float(b), choice) for n, (_, b, choice) in enumerate(answers)}
    found = compare("task", "arm", first, other)
    growth = np.array([float(b) - float(a) for a, b, _ in answers])
    assert found.difference == pytest.approx(growth.mean())
    assert found.standard_error == pytest.approx(growth.std(ddof=1) / math.sqrt(len(growth)))
    assert found.changed == pytest.approx(np.mean([choice != 0 for _, _, choice in answers]))
    assert found.became_right == (growth > 0).sum()
    assert found.became_wrong == (growth < 0).sum()
    assert found.questions == len(answers)


def test_questions_may_stand_in_any_order_and_scores_need_not_be_right_or_wrong() -> None:
    first = {0: Answered(0.25, "a"), 7: Answered(0.5, "b")}
    other = {7: Answered(0.75, "b"), 0: Answered(0.25, "c")}
    found = compare("task", "arm", first, other)
    assert found.difference == pytest.approx(0.125)
    assert found.changed == 0.5
    assert (found.became_right, found.became_wrong) == (None, None)
    single = compare("task", "arm", {0: Answered(1.0, "a")}, {0: Answered(0.0, "a")})
    assert (single.difference, single.standard_error) == (-1.0, None)


TEXTS = st.lists(
    st.tuples(st.floats(-50, -1), st.floats(-50, -1), st.integers(1, 30)), min_size=2, max_size=9
)


@given(texts=TEXTS)
def test_perplexities_grow_relatively(texts: list[tuple[float, float, int]]) -> None:
    first = {n: Answered((a, float(w)), None) for n, (a, _, w) in enumerate(texts)}
    other = {n: Answered((b, float(w)), None) for n, (_, b, w) in enumerate(texts)}
    found = compare("task", "arm", first, other)
    words = sum(w for _, _, w in texts)
    before = math.exp(-sum(a for a, _, _ in texts) / words)
    after = math.exp(-sum(b for _, b, _ in texts) / words)
    assert found.difference == pytest.approx(after / before - 1, rel=1e-6, abs=1e-9)
    assert found.changed is None
    assert found.became_right is None


def test_the_error_of_a_perplexity_is_that_of_psps_own_gaps() -> None:
    import torch

    from architectures.windows import growth_error

    first, other = (
        [(-10.0, 4.0), (-7.0, 3.0), (-3.0, 2.0)],
        [(-11.0, 4.0), (-7.5, 3.0), (-4.0, 2.0)],
    )
    found = perplexity_growth(first, other)
    growths = torch.tensor([a[0] - b[0] for a, b in zip(first, other, strict=True)]).double()
    words = torch.tensor([each[1] for each in first]).double()
    expected = growth_error(growths, words, growths.sum() / words.sum())
    assert found.error == pytest.approx(expected, rel=1e-6)
    assert perplexity_growth(first[:1], other[:1]).error is None


def test_bits_grow_as_their_ratio() -> None:
    first, other = [(-10.0, 4.0), (-7.0, 3.0)], [(-11.0, 4.0), (-7.5, 3.0)]
    found = bits_growth(first, other)
    assert found.mean == pytest.approx(18.5 / 17 - 1)
    left = [11 - 10 * 18.5 / 17, 7.5 - 7 * 18.5 / 17]
    assert found.error == pytest.approx(math.hypot(*left) / 17)


def test_where_questions_have_no_values_scores_are_compared() -> None:
    first, other = {0: Answered(None, "a"), 1: Answered(None, "b")}, {}
    other = {0: Answered(None, "a"), 1: Answered(None, "c")}
    found = compare("task", "arm", first, other, whole=-0.25)
    assert (found.difference, found.standard_error, found.changed) == (-0.25, None, 0.5)
    assert (found.became_right, found.became_wrong) == (None, None)


def test_several_tasks_are_pooled_by_their_questions() -> None:
    values = [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0, 1.0]]
    parts = [(mean_growth(each), len(each)) for each in values]
    found = pooled(parts)
    assert found.mean == pytest.approx(np.mean(values[0] + values[1]))
    assert found.error == pytest.approx(
        math.hypot(*((each.error or 0) * count for each, count in parts)) / 8
    )
    assert pooled([(Growth(1.0, None), 1), (Growth(0.0, 0.1), 1)]).error is None


def test_columns_are_means_of_tasks_in_per_cent() -> None:
    parts = [
        Part(Growth(0.5, 0.03), Growth(0.01, 0.004)),
        Part(Growth(0.7, 0.04), Growth(-0.03, 0.003)),
    ]
    found = column("Reading", "predictors", ("boolq", "lambada"), parts)
    assert found.percent == pytest.approx(60)
    assert found.standard_error == pytest.approx(2.5)
    assert found.difference == pytest.approx(-1)
    assert found.difference_error == pytest.approx(0.25)
    first = column("Reading", "dense", ("boolq",), [Part(Growth(0.5, None), None)])
    assert (first.percent, first.standard_error, first.difference) == (50, None, None)
    missing = column("Reading", "dense", ("boolq", "lambada"), [parts[0], None])
    assert missing.percent is None


def test_averages_are_missing_where_a_column_is() -> None:
    columns = [
        ColumnScore(
            column=title,
            arm="a",
            percent=percent,
            standard_error=error,
            tasks=(title,),
            difference=growth,
            difference_error=0.1,
        )
        for title, percent, error, growth in (("x", 40.0, 3.0, 1.0), ("y", 60.0, 4.0, -2.0))
    ]
    found = average("Average", "a", columns)
    assert found.percent == 50
    assert found.standard_error == pytest.approx(2.5)
    assert found.difference == pytest.approx(-0.5)
    assert found.tasks == ("x", "y")
    gone = ColumnScore(column="z", arm="a", percent=None, tasks=("z",))
    assert average("Average", "a", [*columns, gone]).percent is None
