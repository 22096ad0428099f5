"""Datasets of the hub: how they are streamed, which files psp reads itself, what is refused."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import datasets
import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from common.documents import read_documents
from common.errors import DataError

refused = partial(conftest.refused, DataError)


@pytest.fixture
def streams(
    monkeypatch: pytest.MonkeyPatch, hub_answers: None
) -> Callable[[Callable[[], Iterable[Any]]], list[Any]]:
    """Let a dataset give rows, and return what it was asked for."""

    def give(rows: Callable[[], Iterable[Any]]) -> list[Any]:
        calls: list[Any] = []

        def load(*args: Any) -> SimpleNamespace:
            def stream(**options: Any) -> Iterable[Any]:
                calls.append((args, options))
                return rows()

            return SimpleNamespace(config=SimpleNamespace(), as_streaming_dataset=stream)

        monkeypatch.setattr(datasets, "load_dataset_builder", load)
        return calls

    return give


@pytest.mark.parametrize(
    ("source", "name", "config", "split"),
    [
        ("hf:owner/name", "owner/name", None, "train"),
        ("hf:name:config", "name", "config", "train"),
        ("hf:name:config:test", "name", "config", "test"),
        ("hf:name::test", "name", None, "test"),
    ],
)
def test_datasets_are_streamed_by_name_config_and_split(
    streams: Any, source: str, name: str, config: str | None, split: str
) -> None:
    calls = streams(lambda: [{"body": "one"}, {"body": ""}, {"body": "two"}])
    assert list(read_documents(source, "body")) == ["one", "two"]
    assert calls == [((name, config), {"split": split})]


def test_a_dataset_that_cannot_be_reached_is_one_line(streams: Any) -> None:
    def rows() -> list[dict[str, str]]:
        raise ConnectionError("Couldn't reach the Hub\nsecond line\nthird line")

    streams(rows)
    with refused("hf:owner/name", "Couldn't reach the Hub", "check name and network"):
        list(read_documents("hf:owner/name"))


def test_a_connection_lost_between_rows_is_one_line(streams: Any) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise TimeoutError

    streams(rows)
    documents = read_documents("hf:owner/name")
    assert next(documents) == "one"
    with refused("hf:owner/name", "after 1 row", "TimeoutError", "network"):
        next(documents)


def test_a_dataset_row_without_the_field_is_refused(streams: Any) -> None:
    streams(lambda: [{"content": "a"}])
    with refused("hf:owner/name row 0", "'text'", "found: content", "--field"):
        list(read_documents("hf:owner/name"))


def test_nulls_of_a_dataset_are_passed_over(streams: Any) -> None:
    streams(lambda: [{"text": "a"}, {"text": None}, {"text": "b"}])
    documents = read_documents("hf:owner/name")
    assert list(documents) == ["a", "b"]
    assert documents.skipped == 1


def write_lines(path: Path, rows: Iterable[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("rest", ["/gone", "::test"])
def test_an_unknown_dataset_or_split_is_one_line(tmp_path: Path, rest: str) -> None:
    write_lines(tmp_path / "train.jsonl", [{"text": "a"}])
    with refused(f"hf:{tmp_path}{rest}", "cannot be loaded", "check name"):
        list(read_documents(f"hf:{tmp_path}{rest}"))


@pytest.mark.parametrize("source", ["hf:", "hf::config", "hf:a:b:c:d"])
def test_a_malformed_dataset_name_is_refused_without_a_look_at_the_network(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    def load(*args: Any, **options: Any) -> None:
        pytest.fail("the network was tried")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    with refused(source, "hf:NAME[:CONFIG][:SPLIT]"):
        list(read_documents(source))


def test_a_value_that_is_no_text_is_refused_by_its_line_and_texts_stay_as_they_are(
    tmp_path: Path,
) -> None:
    """The library would give every text of the block of such a row, and of all behind it, as JSON.

    Texts that are JSON themselves could not be told from those.
    """
    texts = [f'"{number}" '.strip() * 100 if number % 2 else "true" for number in range(2_000)]
    rows: list[object] = [{"text": text} for text in texts]
    write_lines(tmp_path / "train.jsonl", [*rows, {"text": 3}, *rows])
    documents = read_documents(f"hf:{tmp_path}")
    for text in texts:
        assert next(documents) == text
    with refused(f"hf:{tmp_path} train.jsonl:2001", "'text' but int", "mend the row"):
        next(documents)


def test_columns_that_come_and_go_between_json_files_do_no_harm(tmp_path: Path) -> None:
    write_lines(tmp_path / "train-0.jsonl", [{"text": "one"}, {"text": "two", "id": 1}])
    write_lines(
        tmp_path / "train-1.jsonl", [{"text": "three", "more": 1}, {"text": "4", "id": "x"}]
    )
    assert list(read_documents(f"hf:{tmp_path}")) == ["one", "two", "three", "4"]


def test_a_column_of_one_file_only_is_named(tmp_path: Path) -> None:
    for number, columns in enumerate([{"text": ["a"]}, {"text": ["b"], "url": ["x"]}]):
        parquet.write_table(pyarrow.table(columns), tmp_path / f"train-{number}.parquet")
    documents = read_documents(f"hf:{tmp_path}")
    assert next(documents) == "a"
    with refused(f"hf:{tmp_path}: after 1 row", "has 'url' besides", "a configuration"):
        next(documents)


@pytest.mark.usefixtures("hub_answers")
def test_json_files_of_a_dataset_come_from_wherever_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of the hub do, whose addresses begin with hf://."""
    rows = "".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(9))
    with fsspec.open("memory://shard/a.jsonl.gz", "wb", compression="gzip") as file:
        file.write(rows.encode())
    config = SimpleNamespace(
        on_mixed_types="use_json",
        field=None,
        encoding="utf-8",
        data_files={"test": ["memory://shard/a.jsonl.gz"]},
    )
    builder = SimpleNamespace(config=config)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args: builder)
    assert list(read_documents("hf:owner/name::test")) == [f"document {n}" for n in range(9)]


def test_json_in_an_archive_that_the_library_would_spoil_is_refused(tmp_path: Path) -> None:
    rows: list[object] = [{"text": f"{number}" * 100} for number in range(200)]
    write_lines(tmp_path / "rows.jsonl", [*rows, {"text": 3}])
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.write(tmp_path / "rows.jsonl", "train.jsonl")
    (tmp_path / "rows.jsonl").unlink()
    with refused(f"hf:{tmp_path}", "/text", "changed from string to number", "mend the row"):
        list(read_documents(f"hf:{tmp_path}"))
