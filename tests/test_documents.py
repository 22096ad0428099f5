"""Text sources: what is read, what stays untouched, and what is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import datasets
import pytest

from common.documents import TEXT_DOCUMENT_CHARACTERS, read_documents, read_text
from common.errors import DataError

refused = partial(conftest.refused, DataError)


def write_lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def paragraphs(count: int, end: str = "\n") -> str:
    """Return paragraphs of 1,000 characters, each of two lines and followed by a blank line."""
    return "".join(
        f"{number:04d}".ljust(500, "x") + end + "é" * 500 + end + end for number in range(count)
    )


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_text_is_cut_at_blank_lines_and_joins_to_itself(tmp_path: Path, end: str) -> None:
    text = paragraphs(52, end) + "the last paragraph has no blank line after it"
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    documents = list(read_documents(str(path)))
    assert "".join(documents) == text
    assert len(documents) == 3 + 1
    paragraph = len(paragraphs(1, end))
    for document in documents[:-1]:
        assert document.endswith(end + end)
        # Cut at the first blank line past the limit, not later.
        assert 0 <= len(document) - TEXT_DOCUMENT_CHARACTERS < paragraph


def test_a_text_without_blank_lines_is_one_document(tmp_path: Path) -> None:
    text = "a line\n" * 5000
    assert len(text) > 2 * TEXT_DOCUMENT_CHARACTERS
    (tmp_path / "solid.txt").write_text(text)
    assert list(read_documents(str(tmp_path / "solid.txt"))) == [text]


def test_a_line_of_blanks_counts_as_a_blank_line(tmp_path: Path) -> None:
    first = "x" * TEXT_DOCUMENT_CHARACTERS + "\n \t\n"
    (tmp_path / "a.txt").write_text(first + "second\n")
    assert list(read_documents(str(tmp_path / "a.txt"))) == [first, "second\n"]


def test_json_lines_are_documents_in_order_untouched(tmp_path: Path) -> None:
    texts = ["one\r\ntwo\r\n", "naïve — 測試", "  indented\n\n"]
    source = write_lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    assert list(read_documents(source)) == texts


def test_blank_lines_and_blank_documents_of_json_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": " \\n"}\n{"text": ""}\n{"text": "two"}')
    assert list(read_documents(str(path))) == ["one", "two"]


def test_the_field_names_the_key_of_the_text(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"text": "no", "body": "yes"})
    assert list(read_documents(source, "body")) == ["yes"]
    assert list(read_documents(source)) == ["no"]


def test_documents_are_read_one_by_one(tmp_path: Path) -> None:
    """The first document comes before the broken second line is looked at."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nnot JSON\n')
    documents = read_documents(str(path))
    assert next(documents) == "one"
    with refused(f"{path}:2", "not valid JSON", "mend the line"):
        next(documents)


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with refused(str(tmp_path / name), "no such file", "--data"):
        list(read_documents(str(tmp_path / name)))


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "dir.txt").mkdir()
    with refused(str(tmp_path / "dir.txt"), "no such file"):
        list(read_documents(str(tmp_path / "dir.txt")))


@pytest.mark.parametrize("name", ["a.csv", "a", "a.json", "a.txt.gz"])
def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text")
    with refused(str(tmp_path / name), "FILE.txt", "FILE.jsonl", "hf:NAME"):
        list(read_documents(str(tmp_path / name)))


@pytest.mark.parametrize("content", ["", " \n\t\n\n"], ids=["empty", "blank"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_source_without_text_is_refused(tmp_path: Path, suffix: str, content: str) -> None:
    path = tmp_path / f"empty.{suffix}"
    path.write_text(content)
    with refused(str(path), "holds no text", "at least one document"):
        list(read_documents(str(path)))


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_another_encoding_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"latin.{suffix}"
    path.write_bytes('{"text": "café"}\n'.encode("latin-1"))
    with refused(str(path), "not UTF-8", "convert the file to UTF-8"):
        list(read_documents(str(path)))


@pytest.mark.parametrize("row", ["{", "{'text': 'a'}", '{"text": "a"} x'])
def test_a_broken_json_line_is_named_by_its_number(tmp_path: Path, row: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one"}}\n\n{row}\n')
    with refused(f"{path}:3", "not valid JSON", "mend the line"):
        list(read_documents(str(path)))


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"body": "a", "id": 3}, "body, id"),
        ({"text": 3}, "text"),
        ({"text": None}, "text"),
        (["a"], "list"),
        ("a", "str"),
    ],
)
def test_a_row_without_the_field_is_refused_and_says_what_it_has(
    tmp_path: Path, row: object, found: str
) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"text": "fine"}, row)
    with refused(f"{source}:2", "'text'", f"found: {found}", "--field"):
        list(read_documents(source))


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
    monkeypatch: pytest.MonkeyPatch, source: str, name: str, config: str | None, split: str
) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load(*args: Any, **options: Any) -> list[dict[str, str]]:
        calls.append((args, options))
        return [{"body": "one"}, {"body": ""}, {"body": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_documents(source, "body")) == ["one", "two"]
    assert calls == [((name, config), {"split": split, "streaming": True})]


def test_a_dataset_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> list[dict[str, str]]:
        raise ConnectionError("Couldn't reach the Hub\nsecond line\nthird line")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with refused("hf:owner/name", "Couldn't reach the Hub", "check name and network"):
        list(read_documents("hf:owner/name"))


def test_a_connection_lost_between_rows_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise TimeoutError

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows())
    documents = read_documents("hf:owner/name")
    assert next(documents) == "one"
    with refused("hf:owner/name", "TimeoutError", "network"):
        next(documents)


def test_a_dataset_row_without_the_field_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: [{"content": "a"}])
    with refused("hf:owner/name row 0", "'text'", "found: content", "--field"):
        list(read_documents("hf:owner/name"))


@pytest.mark.parametrize("source", ["hf:", "hf::config", "hf:a:b:c:d"])
def test_a_malformed_dataset_name_is_refused_without_a_look_at_the_network(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    def load(*args: Any, **options: Any) -> None:
        pytest.fail("the network was tried")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with refused(source, "hf:NAME[:CONFIG][:SPLIT]"):
        list(read_documents(source))


def test_a_whole_text_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    content = "".join(f"line {number}\n\n" for number in range(9000)) + "end without newline"
    path.write_text(content, encoding="utf-8")
    assert len(list(read_documents(str(path)))) > 1
    assert read_text(str(path)) == content


def test_documents_of_other_sources_are_joined_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text('{"body": "one"}\n{"body": "two"}\n', encoding="utf-8")
    assert read_text(str(path), "body") == "one\ntwo"
