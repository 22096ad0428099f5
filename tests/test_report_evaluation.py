"""What the page shows of an evaluation: judgements, pictures, tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from made_up_evaluation import ARMS, TASKS, evaluation
from made_up_results import Document, write
from test_report_page import HOSTILE, Page, rendered

from report.answer_tables import judgements, share_tables, suite_table
from report.answers import (
    MOST,
    Judged,
    changed_groups,
    drawn_note,
    headlines,
    judged_tasks,
    score_groups,
    sentences,
    signed,
)
from report.figures.evaluation import ChangedBar, drawn_title
from report.runs import load_runs
from report.words import warnings
from results.evaluation import Evaluation

MMLU = [f"mmlu_subject_{number}" for number in range(57)]


def loaded(place: Path, document: Document) -> Evaluation:
    (run,) = load_runs([write(place, evaluation=document)])
    assert run.evaluation is not None
    return run.evaluation


def judged(difference: float, error: float | None, **other: Any) -> Judged:
    known: Document = {"title": "piqa", "questions": 400, "changed": True, "better": difference > 0}
    return Judged(**{**known, "difference": difference, "error": error, "unit": " points"} | other)


@pytest.mark.parametrize(
    ("difference", "error", "outcome", "words"),
    [
        (-3.2, 1.5, "worse", "piqa (−3.20 ± 1.50 points, worse)"),
        (3.2, 1.5, "better", "piqa (+3.20 ± 1.50 points, better)"),
        (3.0, 1.5, "not seen", "piqa (400 questions could have shown one of 3.00 points)"),
        (-0.1, 1.5, "not seen", "piqa (400 questions could have shown one of 3.00 points)"),
        (0.0, 1.5, "not seen", "piqa (400 questions could have shown one of 3.00 points)"),
        (0.0, 0.0, "the same", "piqa (the same score to all 400 questions)"),
        (-100.0, 0.0, "worse", "piqa (−100.00 ± 0.00 points, worse)"),
        (-100.0, None, "unknown", "piqa (error unknown)"),
    ],
)
def test_a_difference_is_one_beyond_two_standard_errors(
    difference: float, error: float | None, outcome: str, words: str
) -> None:
    found = judged(difference, error)
    assert found.outcome == outcome
    assert found.words == words


def test_a_single_question_has_no_error() -> None:
    assert judged(-100.0, None, questions=1).words == "piqa (one question, error unknown)"


def test_the_same_answers_are_more_than_the_same_score() -> None:
    assert "the same answers to all 400" in judged(0.0, 0.0, changed=False).words
    assert "the same score to all 400" in judged(0.0, 0.0, changed=None).words


def test_many_differences_are_counted_and_chance_is_told() -> None:
    clear = [judged(-5.0, 1.0, title=f"t{number}") for number in range(10)]
    unseen = [judged(0.5, 1.0 + number, title=f"u{number}") for number in range(30)]
    same = [judged(0.0, 0.0, title=f"s{number}") for number in range(12)]
    said = sentences(clear + unseen + same, "dense")
    assert said[0].startswith("Differs from dense in t0 (−5.00 ± 1.00 points, worse), t1 ")
    assert said[0].endswith(", and 2 more.")
    assert said[1] == (
        "No difference seen in 30 others: each could have shown one of 2.00 to 60.00."
    )
    assert said[2] == "The same in 12 others."
    assert said[3].startswith("Of 52 that are compared about 2 would seem to differ by chance")
    assert sentences(unseen[:1], "dense") == [
        "No difference seen in u0 (400 questions could have shown one of 2.00 points)."
    ]
    assert sentences([], "dense") == []


def test_less_of_a_perplexity_is_better(tmp_path: Path) -> None:
    found = judged_tasks(loaded(tmp_path, evaluation()), "q4_0")
    assert [each.title for each in found] == [*TASKS, "text"]
    assert found[-1].outcome == "worse"
    assert found[-1].words == "text (+3.10 ± 1.00 %, worse)"
    assert [each.outcome for each in found[:-1]] == ["worse"] * 3
    document = evaluation()
    document["tasks"][-1]["higher_is_better"] = True
    found = judged_tasks(loaded(tmp_path, document), "q4_0")
    assert found[-1].outcome == "better"


def test_pictures_hold_what_the_document_does(tmp_path: Path) -> None:
    document = evaluation()
    found = loaded(tmp_path, document)
    groups = score_groups(found)
    assert [group.title for group in groups] == list(TASKS)
    assert [group.chance for group in groups] == [50.0, 25.0, None]
    first = document["scores"][0]
    assert groups[0].bars[0].percent == 100 * first["value"]
    assert groups[0].bars[0].error == 100 * first["standard_error"]
    changed = changed_groups(found)
    assert [[bar.arm for bar in group.bars] for group in changed] == [[1, 2]] * 3
    measured = document["differences"][0]
    bar = changed[0].bars[0]
    assert bar.percent == 100 * measured["changed"]
    assert (bar.right, bar.wrong) == (measured["became_right"], measured["became_wrong"])
    assert sum(part for _, part in bar.parts) == pytest.approx(bar.percent)
    assert drawn_note(found) == ""


def test_answers_without_a_right_one_are_one_bar() -> None:
    bar = ChangedBar(arm=1, percent=12.5, right=None, wrong=None, questions=8)
    assert [part for _, part in bar.parts] == [12.5]
    assert bar.value == "12.5 %"


def test_of_many_tasks_the_columns_the_groups_or_the_most_different_are_drawn(
    tmp_path: Path,
) -> None:
    found = loaded(tmp_path, evaluation(MMLU))
    assert [group.title for group in score_groups(found)] == ["Average", "Commonsense", "GSM8K"]
    assert "the columns" in drawn_note(found)
    found = loaded(tmp_path, evaluation(MMLU, columns=False, groups=["mmlu", "mmlu_stem"]))
    assert [group.title for group in score_groups(found)] == ["mmlu", "mmlu_stem"]
    assert "groups of tasks" in drawn_note(found)
    (summed,) = changed_groups(found)
    assert summed.title == "all tasks"
    own = [each for each in found.differences if each.arm == "q4_0"]
    assert summed.bars[1].right == sum(each.became_right or 0 for each in own)
    assert summed.bars[1].questions == 57 * 400
    document = evaluation(MMLU, columns=False)
    document["differences"][2 * 40 + 1]["difference"] = -0.9
    found = loaded(tmp_path, document)
    titles = [group.title for group in score_groups(found)]
    assert len(titles) == MOST
    assert "mmlu_subject_40" in titles
    assert titles == sorted(titles, key=MMLU.index)
    assert "20 of 57" in drawn_note(found)


def test_sixty_tasks_are_in_a_table_that_is_closed(tmp_path: Path) -> None:
    source = rendered(tmp_path, {"evaluation": evaluation(MMLU)})
    page = Page(source)
    assert "Table of 57 tasks" in page.texts["summary"]
    closed = next(text for text in page.texts["details"] if text.startswith("Table of 57"))
    assert all(task in closed for task in MMLU)
    assert all(float((each["viewbox"] or "").split()[3]) < 600 for each in page.named("svg"))
    assert len(source) < 200_000


def test_the_tables_hold_scores_differences_and_counts(tmp_path: Path) -> None:
    found = loaded(tmp_path, evaluation())
    table = share_tables(found)[0]
    assert [row[0] for row in table.rows] == list(ARMS)
    score, difference = found.scores[1], found.differences[0]
    assert table.rows[0][3:] == ["–", "", "–", "–", "–", "400"]
    assert table.rows[1] == [
        "predictors",
        "94.01",
        f"{100 * score.value:.2f} ± {100 * (score.standard_error or 0):.2f}",
        f"{signed(100 * difference.difference)} ± {100 * (difference.standard_error or 0):.2f}",
        "none seen",
        f"{100 * (difference.changed or 0):.2f}",
        str(difference.became_right),
        str(difference.became_wrong),
        "400",
    ]
    assert table.rows[2][1] == "–"


def test_the_suite_has_its_table_with_the_card_below(tmp_path: Path) -> None:
    suite = suite_table(loaded(tmp_path, evaluation()))
    assert suite is not None
    assert suite.titles == ["model", "Sparsity", "Average", "Code", "Commonsense", "GSM8K", "BBH"]
    assert suite.arms[1][:5] == ["predictors", "94.01", "39.00 ± 1.20", "–", "60.50 ± 1.20"]
    assert suite.differences[1][:4] == ["q4_0", "", "−2.00 ± 0.60", "–"]
    card = ["Made-up-7B (card)", "89.32", "38.46", "–", "66.99", "–", "31.08"]
    assert suite.published == [card]
    page = Page(rendered(tmp_path / "page", {"evaluation": evaluation()}))
    grey = page.source[page.source.index('<tbody class="published">') :]
    assert grey.index("Made-up-7B (card)") < grey.index("</tbody>")
    assert suite_table(loaded(tmp_path, evaluation(columns=False))) is None


def test_the_page_says_what_differs_and_what_was_asked(tmp_path: Path) -> None:
    document = evaluation()
    page = Page(rendered(tmp_path, {"evaluation": document}))
    assert page.texts["h1"] == ["models/made-up-7b"]
    for text in (
        "predictors: worse than dense in 2 and better in 0 of 4 tasks",
        "not finished: q4_0: mbpp",
        "gsm8k: 3 answers had no number in them",
        "Columns: differs from dense in Average (−2.00 ± 0.60 points, worse)",
        "400 questions could have shown one of",
        "7c" * 32,
        "6b" * 32,
        "Question of piqa:\n  which <b>?\nAnswer:",
        "multiple_choice",
        "400 of 4,000",
        "1234",
        "versions.lm_eval0.4.13",
    ):
        assert text in page.text, text
    assert "No speed was measured" not in page.text


def test_perplexities_are_no_percentages(tmp_path: Path) -> None:
    page = Page(rendered(tmp_path, {"evaluation": evaluation()}))
    (table,) = [text for text in page.texts["table"] if "no shares of questions" in text]
    assert "word_perplexity, lower is better" in table
    assert "8.3500+3.10 ± 1.00 %differs: worse64" in table
    assert "835" not in page.text
    document = evaluation()
    for score in document["scores"]:
        if score["metric"] == "word_perplexity":
            score |= {"value": 0.7, "metric": "bits_per_byte"}
    document["tasks"][-1]["metric"] = "bits_per_byte"
    titles = [group.title for group in score_groups(loaded(tmp_path, document))]
    assert titles == list(TASKS)


def test_one_arm_is_compared_with_nothing(tmp_path: Path) -> None:
    document = evaluation(arms=1, columns=False)
    assert headlines(loaded(tmp_path, document)) == ["dense answered 4 tasks; nothing is compared."]
    page = Page(rendered(tmp_path / "page", {"evaluation": document}))
    assert len(page.named("svg")) == 1
    assert "became right" not in " ".join(page.texts["p"])


def test_an_arm_that_broke_off_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    document = evaluation(columns=False)
    for key in ("scores", "differences"):
        document[key] = [each for each in document[key] if each["arm"] != "q4_0"]
    document["scores"] = [each for each in document["scores"] if each["task"] != "gsm8k"]
    document["differences"] = [each for each in document["differences"] if each["task"] != "gsm8k"]
    found = loaded(tmp_path, document)
    assert headlines(found)[1] == "q4_0: no task is compared with dense."
    assert judgements(found)[1] == ("q4_0", [])
    page = Page(rendered(tmp_path / "page", {"evaluation": document}))
    assert "no arm finished it" in page.text
    assert "q4_0: No task is compared." in page.text


def test_runs_that_were_asked_otherwise_do_not_compare(tmp_path: Path) -> None:
    other = evaluation()
    other["unfinished"] = []
    other["tasks"][0]["requests_hash"] = "00" * 32
    write(tmp_path / "a", evaluation=other | {"unfinished": []})
    write(tmp_path / "b", evaluation=evaluation() | {"unfinished": []})
    said = warnings(load_runs([tmp_path / "a", tmp_path / "b"]))
    assert said == [
        ("all runs", "The runs answered other requests of piqa: their scores do not compare.")
    ]
    write(tmp_path / "a", evaluation=evaluation() | {"unfinished": []})
    assert warnings(load_runs([tmp_path / "a", tmp_path / "b"])) == []


def test_a_figure_holds_no_name_that_it_may_not(tmp_path: Path) -> None:
    assert drawn_title("mmlu_stem", 3) == "mmlu_stem"
    hostile = (HOSTILE, "$x$", "a#b", "<b>", 'a" b', "x" * 42, "", "é", "a\n", "url(#x)", " a")
    assert [drawn_title(each, 3) for each in hostile] == ["task 3"] * len(hostile)
    document = evaluation()
    for named in (*document["arms"], *document["tasks"]):
        named["name"] += HOSTILE
    for key in ("scores", "differences", "columns"):
        for each in document[key]:
            each |= {
                name: each[name] + HOSTILE for name in ("task", "arm", "column") if name in each
            }
    source = rendered(tmp_path, {"evaluation": document})
    page = Page(source)
    assert not {"script"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not set(source) & set("\u202e\ud800\x00")
    assert "predictors</script><script>alert(1)</script>" in page.text
    drawn = re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    assert len(drawn) == 2
    assert all("task 1" in svg and "alert" not in svg for svg in drawn)
