"""The card's suite is lm-eval's tasks and the card's numbers; the tiny suite needs no network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import DataError
from evaluation.suites.card import (
    AVERAGE,
    CARD,
    PUBLISHED,
    PUBLISHED_SPARSITY,
)
from evaluation.suites.tiny import HELD_OUT_BYTES, NAMES, library_text, write_tiny
from evaluation.tasks.loading import chance_of, load_tasks, primary_metric
from quickstart.model import library_files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny(None, directory, seed=0, questions=40)
    return directory


def _rows(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def test_published_averages_are_means_of_their_columns() -> None:
    for row in PUBLISHED:
        mean = sum(row.percent[column.title] for column in CARD) / len(CARD)
        assert mean == pytest.approx(row.percent[AVERAGE], abs=0.0051), row.name
    assert set(PUBLISHED_SPARSITY) <= {row.name for row in PUBLISHED}


def test_tiny_tasks_load_with_a_primary_metric_each(tiny: Path) -> None:
    loaded = load_tasks([str(tiny)])
    assert set(loaded.tasks) == set(NAMES)
    found = {name: primary_metric(task)[0] for name, task in loaded.tasks.items()}
    assert found == {
        "tiny_next_line": "acc",
        "tiny_cloze": "acc",
        "tiny_finish": "exact_match",
        "tiny_rolling": "word_perplexity",
    }
    assert all(len(task.eval_docs) == 40 for task in loaded.tasks.values())
    assert chance_of(loaded.tasks["tiny_next_line"]) == 0.25
    assert loaded.tasks["tiny_next_line"].config.num_fewshot == 2


def test_tiny_questions_are_what_the_text_says(tiny: Path) -> None:
    text = library_text()
    bare = "\n".join(line.rstrip() for line in text.splitlines())
    for row in _rows(tiny, "tiny_next_line"):
        assert len(set(row["choices"])) == 4
        assert f"{row['context']}\n{row['choices'][row['label']]}" in bare
    assert len({row["label"] for row in _rows(tiny, "tiny_next_line")}) == 4
    for row in _rows(tiny, "tiny_cloze"):
        assert row["context"] + row["target"] in bare
        assert row["target"].strip() in row["context"]
    for row in _rows(tiny, "tiny_finish"):
        assert any(f"{row['prompt']}{gap}{row['answer']}\n" in bare for gap in ("", " "))
    assert all(row["text"] in text for row in _rows(tiny, "tiny_rolling"))
    asked = {json.dumps(row) for row in _rows(tiny, "tiny_next_line")}
    assert asked.isdisjoint(map(json.dumps, _rows(tiny, "tiny_next_line.examples")))


def _digest(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


def test_tiny_follows_from_text_and_seed(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(library_text(), encoding="utf-8")
    write_tiny(text, tmp_path / "same", seed=0, questions=40)
    write_tiny(text, tmp_path / "other", seed=1, questions=40)
    assert _digest(tmp_path / "same") == _digest(tiny)
    other = _digest(tmp_path / "other")
    assert all(other[f"{name}.jsonl"] != _digest(tiny)[f"{name}.jsonl"] for name in NAMES)


def test_no_quickstart_trains_on_the_tiny_text() -> None:
    assert all(path.stat().st_size <= HELD_OUT_BYTES for path in library_files())


def test_a_text_that_is_too_short_is_told(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 5)
    with pytest.raises(DataError, match=r"text.txt: gives 0 questions for tiny_next_line, of 40"):
        write_tiny(text, tmp_path / "out", seed=0, questions=40)
