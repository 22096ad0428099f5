"""Text sources: what is read, what stays untouched, and what is refused in one line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import pyarrow
import pytest
from pyarrow import parquet

from common.documents import read_documents, read_text
from common.errors import DataError
from common.text_sources.rows import LONGEST_TEXT_CHARACTERS, TEXT_DOCUMENT_CHARACTERS

refused = partial(conftest.refused, DataError)


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> str:
    parquet.write_table(pyarrow.table(columns), path, **options)
    return str(path)


def write(path: Path, rows: list[Any]) -> str:
    """Write rows in the kind that the suffix names."""
    if path.suffix == ".parquet":
        return write_parquet(path, {key: [row[key] for row in rows] for key in rows[0]})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    array = json.dumps(rows, indent=1, ensure_ascii=False)
    path.write_text(array if path.suffix == ".json" else lines, encoding="utf-8")
    return str(path)


def paragraphs(count: int, end: str = "\n") -> str:
    """Return paragraphs of 1,000 characters, each of two lines and followed by a blank line."""
    return "".join(
        f"{number:04d}".ljust(500, "x") + end + "é" * 500 + end + end for number in range(count)
    )


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_text_is_cut_at_blank_lines_and_joins_to_itself(tmp_path: Path, end: str) -> None:
    text = paragraphs(52, end) + "the last paragraph has no blank line after it"
    (tmp_path / "long.txt").write_bytes(text.encode())
    documents = list(read_documents(str(tmp_path / "long.txt")))
    assert "".join(documents) == text
    assert len(documents) == 3 + 1
    for document in documents[:-1]:
        assert document.endswith(end + end)
        # Cut at the first blank line past the limit, not later.
        assert 0 <= len(document) - TEXT_DOCUMENT_CHARACTERS < len(paragraphs(1, end))


def test_a_text_without_blank_lines_is_one_document(tmp_path: Path) -> None:
    text = "a line\n" * 5000
    assert 2 * TEXT_DOCUMENT_CHARACTERS < len(text) < LONGEST_TEXT_CHARACTERS
    (tmp_path / "solid.txt").write_text(text)
    assert list(read_documents(str(tmp_path / "solid.txt"))) == [text]


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_long_text_without_blank_lines_is_cut_at_line_ends(tmp_path: Path, end: str) -> None:
    line = "y" * 98 + end
    text = line * 3000 + "end"
    (tmp_path / "solid.txt").write_bytes(text.encode())
    documents = list(read_documents(str(tmp_path / "solid.txt")))
    assert "".join(documents) == text == read_text(str(tmp_path / "solid.txt"))
    assert len(documents) == len(text) // LONGEST_TEXT_CHARACTERS + 1
    for document in documents[:-1]:
        assert document.endswith(end)
        assert 0 <= len(document) - LONGEST_TEXT_CHARACTERS < len(line)


def test_a_long_text_is_not_read_to_its_end_for_its_first_document(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_bytes(b"a line\n" * 100_000 + b"\xff")
    first = next(read_documents(str(tmp_path / "long.txt")))
    assert LONGEST_TEXT_CHARACTERS <= len(first) < LONGEST_TEXT_CHARACTERS + 7


def test_a_line_of_blanks_counts_as_a_blank_line(tmp_path: Path) -> None:
    first = "x" * TEXT_DOCUMENT_CHARACTERS + "\n \t\n"
    (tmp_path / "a.txt").write_text(first + "second\n")
    assert list(read_documents(str(tmp_path / "a.txt"))) == [first, "second\n"]


def test_blank_lines_and_blank_documents_of_json_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": " \\n"}\n{"text": ""}\n{"text": "two"}')
    assert list(read_documents(str(path))) == ["one", "two"]


def test_a_broken_line_is_met_after_all_documents_before_it(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    rows = "".join(f'{{"text": "document {n}"}}\n' for n in range(20_000))
    path.write_bytes((rows + "{\n" + rows).encode() + b"\xff")
    documents = read_documents(str(path))
    assert next(documents) == "document 0"
    with refused(f"{path}:20001", "not valid JSON", "mend the line"):
        for number, document in enumerate(documents, 1):
            assert document == f"document {number}"
    assert number == 19_999


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_rows_of_every_kind_are_the_same_documents(tmp_path: Path, suffix: str) -> None:
    texts = ["one\r\ntwo\r\n", " \n", "naïve — 測試 🙂", "  indented\n\n", ""]
    rows = [{"id": n, "body": text, "text": "no"} for n, text in enumerate(texts)]
    source = write(tmp_path / f"a.{suffix}", rows)
    assert list(read_documents(source, "body")) == [texts[0], *texts[2:4]]
    assert list(read_documents(source)) == ["no"] * len(texts)


def test_an_object_per_line_called_json_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n  {"text": "one"}\n\n{"text": "two"}\n{"text":\n')
    documents = read_documents(str(path))
    assert [next(documents), next(documents)] == ["one", "two"]
    with refused(f"{path}:5", "not valid JSON", "an array of objects, or an object a line"):
        next(documents)


@pytest.mark.parametrize(
    "content", ['[{"text": "a"}', '[{"text": "a"},]', '[{"text": "a"}] x', "[", "[1 2]"]
)
def test_a_broken_json_array_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with refused(str(tmp_path / "a.json"), "not valid JSON", "mend the file"):
        list(read_documents(str(tmp_path / "a.json")))


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 200_000], ids=["array", "object"])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_nested_without_end_is_refused(tmp_path: Path, suffix: str, content: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text(content)
    with refused(str(path), "not valid JSON", "recursion"):
        list(read_documents(str(path)))


def test_parquet_is_streamed(tmp_path: Path) -> None:
    texts = [f"{number:04d}" * 1000 for number in range(2000)]
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False}
    path = tmp_path / "a.parquet"
    write_parquet(path, {"text": [*texts, "SPOIL"]}, row_group_size=100, **options)
    path.write_bytes(path.read_bytes().replace(b"SPOIL", b"\xff" * 5))
    documents, before, most = read_documents(str(path)), pyarrow.total_allocated_bytes(), 0
    for text in texts[:1900]:
        assert next(documents) == text
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 2 << 20 < path.stat().st_size // 3
    with refused(str(path), "not a readable Parquet file"):
        list(documents)


def test_only_the_fields_column_of_parquet_is_read(tmp_path: Path) -> None:
    """The other column's values are spoilt in the file, which nobody notices."""
    path = tmp_path / "a.parquet"
    columns = {"a": ["SPOIL"] * 3, "text": ["x", "y", "z"]}
    write_parquet(path, columns, compression="none", use_dictionary=False, write_statistics=False)
    data = path.read_bytes()
    assert data.count(b"\x05\0\0\0SPOIL") == 3
    path.write_bytes(data.replace(b"\x05\0\0\0SPOIL", b"\xff\xff\xff\x7fSPOIL"))
    assert list(read_documents(str(path))) == ["x", "y", "z"]
    with refused(str(path), "not a readable Parquet file"):
        list(read_documents(str(path), "a"))


@pytest.mark.parametrize(
    "kind",
    [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())],
    ids=str,
)
def test_parquet_texts_come_in_every_type_of_text(tmp_path: Path, kind: Any) -> None:
    column = pyarrow.array(["one", "two", "one"], type=kind)
    source = write_parquet(tmp_path / "a.parquet", {"a.b": column})
    assert list(read_documents(source, "a.b")) == ["one", "two", "one"]


@pytest.mark.parametrize(
    ("column", "found"),
    [(1, "int"), (1.5, "float"), (b"a", "bytes"), (True, "bool"), ({"a": "b"}, "dict")],
)
def test_a_column_that_is_not_text_is_refused(tmp_path: Path, column: Any, found: str) -> None:
    source = write_parquet(tmp_path / "a.parquet", {"text": [column]})
    with refused(f"{source} row 0", f"'text' but {found}", "--field"):
        list(read_documents(source))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"text",
        lambda data: b"PAR1" + b"\0" * 100 + b"PAR1",
        lambda data: data[:-20],
        lambda data: data[: len(data) // 2],
        lambda data: data[:4] + b"\xff" * 60 + data[64:],
        lambda data: data[:-40] + b"\xff" * 32 + data[-8:],
        lambda data: data.replace(b"document 50", b"\xff" * 11),
    ],
    ids=["empty", "text", "hollow", "cut", "half", "page", "footer", "UTF-8"],
)
def test_a_damaged_parquet_file_is_refused(tmp_path: Path, damage: Any) -> None:
    texts = [f"document {number}" for number in range(100)]
    source = write_parquet(tmp_path / "a.parquet", {"text": texts}, compression="none")
    Path(source).write_bytes(damage(Path(source).read_bytes()))
    with refused(source, "not a readable Parquet file", "fetch or write it again"):
        list(read_documents(source))


def test_a_null_in_parquet_is_passed_over(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", {"text": ["one"] * 70 + [None]})
    documents = read_documents(source)
    assert list(documents) == ["one"] * 70
    assert documents.skipped == 1
    (note,) = documents.notes
    assert note == f"1 row was passed over, without text under 'text', the first is {source} row 70"


def test_a_parquet_file_without_the_column_is_refused(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", {"id": [], "body": []})
    with refused(source, "no text under 'text'", "found: body, id", "--field"):
        list(read_documents(source))


def test_two_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.table([pyarrow.array(["a"])] * 2, names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with refused("a.parquet", "text", "write it again"):
        list(read_documents(str(tmp_path / "a.parquet")))


def test_a_row_with_any_number_of_names_is_refused_in_a_short_line(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{f"key {number}": 0 for number in range(10_000)}])
    with pytest.raises(DataError, match=r"found: key 0, .*….*--field") as error:
        list(read_documents(source))
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "name", ["gone.txt", "gone.jsonl", "gone.json", "gone.parquet", "gone.csv.gz", "gone"]
)
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with refused(str(tmp_path / name), "no such file", "--data"):
        list(read_documents(str(tmp_path / name)))


@pytest.mark.parametrize("name", ["a.md", "a", "a.JSON", "a.txt.lzma", "a.parquet.gz"])
def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text")
    kinds = ["FILE.txt", "FILE.jsonl", "FILE.json", "FILE.parquet", "hf:NAME"]
    with refused(str(tmp_path / name), *kinds):
        list(read_documents(str(tmp_path / name)))


BLANKS = [(suffix, text) for suffix in ("txt", "jsonl", "json") for text in ("", " \n\t\n\n")]


@pytest.mark.parametrize(("suffix", "content"), [*BLANKS, ("json", " []"), ("parquet", "")])
def test_a_source_without_text_is_refused(tmp_path: Path, suffix: str, content: str) -> None:
    path = tmp_path / f"empty.{suffix}"
    path.write_text(content)
    if suffix == "parquet":
        write_parquet(path, {"text": []})
    with refused(str(path), "holds no text", "at least one document"):
        list(read_documents(str(path)))


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json"])
def test_another_encoding_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"latin.{suffix}"
    path.write_bytes('{"text": "café"}\n'.encode("latin-1"))
    with refused(str(path), "not UTF-8", "convert the file to UTF-8"):
        list(read_documents(str(path)))


@pytest.mark.parametrize(
    "row",
    ["{", "{'text': 'a'}", '{"text": "a"} x', '{"text": ' + "9" * 5000 + "}"],
    ids=["half", "quotes", "rest", "number"],
)
def test_a_broken_json_line_is_named_by_its_number(tmp_path: Path, row: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one"}}\n\n{row}\n')
    with refused(f"{path}:3", "not valid JSON", "mend the line"):
        list(read_documents(str(path)))


PLACES = [("jsonl", ":2"), ("json", " row 1")]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"text": 3}, "but int"),
        ({"text": {"text": "a"}}, "but dict"),
        (["a"], "found: list"),
        ("a", "found: str"),
    ],
)
@pytest.mark.parametrize(("suffix", "place"), PLACES)
def test_a_row_of_another_kind_is_refused_and_says_what_it_has(
    tmp_path: Path, suffix: str, place: str, row: object, found: str
) -> None:
    source = write(tmp_path / f"a.{suffix}", [{"text": "fine"}, row])
    with refused(source + place, "'text'", found, "--field"):
        list(read_documents(source))


@pytest.mark.parametrize(
    ("row", "found"),
    [({"body": "a", "id": 3}, "found: body, id"), ({}, "found: )"), ({"text": None}, "but null")],
)
@pytest.mark.parametrize(("suffix", "place"), PLACES)
def test_a_row_without_text_is_passed_over_and_counted_unless_most_are_such(
    tmp_path: Path, suffix: str, place: str, row: object, found: str
) -> None:
    source = write(tmp_path / f"a.{suffix}", [{"text": "fine"}, row])
    documents = read_documents(source)
    assert list(documents) == ["fine"]
    (note,) = documents.notes
    assert note.startswith("1 row was passed over")
    assert note.endswith(source + place)
    write(tmp_path / f"a.{suffix}", [{"text": "fine"}, row, row])
    with refused(source + place, found, "like 2 of 3 rows", "--field"):
        list(read_documents(source))


def test_nulls_at_the_beginning_stop_nothing_and_a_field_of_few_rows_soon_does(
    tmp_path: Path,
) -> None:
    rows = [{"text": None}] * 50 + [{"text": "a"}] * 50
    documents = read_documents(write(tmp_path / "a.jsonl", rows))
    assert list(documents) == ["a"] * 50
    assert documents.skipped == 50
    source = write(
        tmp_path / "b.jsonl", [{"id": 1}] * 51 + [{"text": "a"}] * 49 + [{"id": 1}] * 900
    )
    taken: list[str] = []
    with refused(f"{source}:1", "found: id", "like 52 of 101 rows", "--field"):
        taken += read_documents(source)
    assert taken == ["a"] * 49


def test_a_whole_text_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    content = "".join(f"line {number}\n\n" for number in range(9000)) + "end without newline"
    path.write_text(content, encoding="utf-8")
    assert len(list(read_documents(str(path)))) > 1
    assert read_text(str(path)) == content


def test_documents_of_other_sources_are_joined_line_by_line(tmp_path: Path) -> None:
    source = write(tmp_path / "two.jsonl", [{"body": "one"}, {"body": "two"}])
    assert read_text(source, "body") == "one\ntwo"
