"""What --data may name: packed files, folders, patterns, several at once and standard input."""

from __future__ import annotations

import bz2
import errno
import gc
import gzip
import io
import json
import lzma
import os
import random
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import conftest
import pyarrow
import pytest

from common.documents import look_at_documents, read_documents, read_text
from common.errors import DataError
from common.text_sources import rows, streams, xz
from common.text_sources.names import need_repeatable, recorded

refused = partial(conftest.refused, DataError)


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.compress(data, codec="zstd", asbytes=True)
    return packed


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstd,
    ".bz2": partial(bz2.compress, compresslevel=1),
    ".xz": partial(lzma.compress, preset=0),
}
TEXTS = ["one\r\ntwo\r\n", "naïve — 測試 🙂", '  "quoted", with commas\n\n', "a\ttab"]
CSV = (
    'id,text\r\n1,"one\r\ntwo\r\n"\r\n\r\n2,naïve — 測試 🙂\r\n'
    '3,"  ""quoted"", with commas\n\n"\r\n4,a\ttab\r\n5,\r\n'
)
TSV = (
    "text\tid\n"
    '"one\r\ntwo\r\n"\t1\nnaïve — 測試 🙂\t2\n'
    '"  ""quoted"", with commas\n\n"\t3\n"a\ttab"\t4\n'
)
CONTENTS = {
    ".jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
    ".json": json.dumps([{"text": text} for text in TEXTS], indent=1),
    ".csv": CSV,
    ".tsv": TSV,
}


def json_lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("packing", ["", *PACK])
@pytest.mark.parametrize("kind", CONTENTS)
def test_every_kind_is_read_packed_or_not_and_with_a_byte_order_mark(
    tmp_path: Path, kind: str, packing: str, mark: bytes
) -> None:
    path = tmp_path / f"a{kind}{packing}"
    path.write_bytes(PACK.get(packing, bytes)(mark + CONTENTS[kind].encode()))
    documents = read_documents(str(path))
    assert list(documents) == TEXTS
    assert documents.skipped == 0


@pytest.mark.parametrize("packing", PACK)
def test_packed_plain_text_is_cut_as_plain_text_is(tmp_path: Path, packing: str) -> None:
    text = "".join(f"line {number}\r\n\r\n" for number in range(9000)) + "the end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / f"b.txt{packing}").write_bytes(PACK[packing](b"\xef\xbb\xbf" + text.encode()))
    plain, packed = str(tmp_path / "a.txt"), str(tmp_path / f"b.txt{packing}")
    documents = list(read_documents(plain))
    assert len(documents) > 1
    assert list(read_documents(packed)) == documents
    assert read_text(packed) == read_text(plain) == text


def test_a_disk_that_is_gone_is_no_matter_to_who_reads_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.BytesIO):
        def close(self) -> None:
            super().close()
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\n")
    monkeypatch.setattr(streams, "_opened", lambda file: Gone(path.read_bytes()))
    (file,) = read_documents(str(path)).files
    pieces = streams._Reading(file)._pieces()  # type: ignore[arg-type]
    assert next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    with refused("not connected"):
        list(streams.lines(file))  # type: ignore[arg-type]


def test_lines_are_whole_wherever_pieces_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nbc\n\n\rd\r\r\nefghij\r")
    found = []
    for size in range(1, 30):
        monkeypatch.setattr(streams, "_PIECE", size)
        (file,) = read_documents(str(path)).files
        found.append(list(streams.lines(file)))  # type: ignore[arg-type]
    assert found == [[b"a\r\n", b"bc\n", b"\n", b"\r", b"d\r", b"\r\n", b"efghij\r"]] * 29


@pytest.mark.parametrize("packing", PACK)
def test_several_members_are_one_text(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(b"".join(PACK[packing](json_lines(text)) for text in ("a", "b", "c")))
    assert list(read_documents(str(path))) == ["a", "b", "c"]


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_a_reading_that_is_given_up_ends_at_once_and_joins_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    """It may be given up by a thread that is about to start, which cannot join another."""
    monkeypatch.setattr(threading.Thread, "join", lambda *args: pytest.fail("joined"))
    path = tmp_path / f"text.jsonl{packing}"
    path.write_bytes(PACK.get(packing, bytes)(json_lines(*["one"] * 1000)))
    documents = read_documents(str(path))
    gc.disable()  # references alone suffice
    try:
        assert next(documents) == "one"
        reading = weakref.ref(iter(documents))
        assert reading() is not None
        del documents
        assert reading() is None
    finally:
        gc.enable()


def test_zeros_may_stand_behind_members_of_xz(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xz, "_PIECE", 3)  # ends amid them
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(b"".join(lzma.compress(json_lines(each)) + bytes(8) for each in "ab"))
    assert list(read_documents(str(path))) == ["a", "b"]


def test_an_xz_file_that_wants_much_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(lzma.compress(json_lines("a")))
    monkeypatch.setattr(xz, "MOST_MEMORY", 1 << 20)
    with refused(f"{path}: cannot be unpacked (Memory usage limit exceeded)", "unpack it"):
        list(read_documents(str(path)))


@pytest.mark.parametrize("packing", PACK)
def test_a_file_that_is_cut_off_gives_what_it_has_and_names_the_line(
    tmp_path: Path, packing: str
) -> None:
    texts = [os.urandom(500).hex() for _ in range(600)]
    path = tmp_path / f"a.jsonl{packing}"
    packed = PACK[packing](json_lines(*texts))
    path.write_bytes(packed[: len(packed) // 2])
    taken: list[str] = []
    with pytest.raises(DataError) as caught:
        taken += read_documents(str(path))
    assert 150 < len(taken) < 350
    assert taken == texts[: len(taken)]
    assert str(caught.value) == (
        f"{path}: cut off after line {len(taken)}; fetch or write it again"
    )


@pytest.mark.parametrize("packing", PACK)
def test_a_damaged_packed_file_is_refused(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.jsonl{packing}"
    numbers = random.Random(1)  # of others zstd without a checksum may make other text
    packed = PACK[packing](json_lines(*(numbers.randbytes(50).hex() for _ in range(100))))
    spoilt = bytearray(packed)
    spoilt[len(packed) // 2 : len(packed) // 2 + 40] = bytes(40)
    path.write_bytes(spoilt)
    with refused(str(path)):
        list(read_documents(str(path)))
    path.write_bytes(packed + b"something else")
    with refused(str(path), "damaged after line 100", "fetch or write it again"):
        list(read_documents(str(path)))
    path.write_bytes(json_lines("a"))
    with refused(str(path), "not compressed as its name says", "suffix"):
        list(read_documents(str(path)))
    path.write_bytes(b"")
    with refused(str(path), "is empty", "fetch or write it again"):
        list(read_documents(str(path)))


@pytest.mark.parametrize("packing", ["", *PACK])
def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LONGEST_LINE", 1 << 18)
    monkeypatch.setattr(streams, "_PIECE", 1 << 16)
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(PACK.get(packing, bytes)(b'{"text": "a"}\n' + bytes(4 << 20)))
    documents = read_documents(str(path))
    tracemalloc.start()
    assert next(documents) == "a"
    with refused(f"{path}:2", "longer than 262 kB", "break the line"):
        next(documents)
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def test_an_array_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LONGEST_ARRAY", 1000)
    path = tmp_path / "a.json"
    path.write_text("[\n" + '{"text": "a"},\n' * 100)
    with refused(str(path), "array of more than 1 kB", ".jsonl"):
        list(read_documents(str(path)))


def test_a_quotation_mark_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "LONGEST_RECORD", 1000)
    path = tmp_path / "a.csv"
    path.write_text('text\na\n"b\n' + "c\n" * 1000)
    documents = read_documents(str(path))
    assert next(documents) == "a"
    with refused(f"{path}:3", "longer than 1 kB", "quotation mark"):
        next(documents)
    path.write_text('text\n"' + "c\n" * 100)
    with refused(f"{path}:2", "not a row of a table", "quote its texts"):
        list(read_documents(str(path)))


def test_a_long_text_fits_a_table(tmp_path: Path) -> None:
    """The library's own limit is 131,072 characters."""
    text = "long " * 100_000
    (tmp_path / "a.csv").write_text(f'id,text\n1,"{text}"\n')
    assert list(read_documents(str(tmp_path / "a.csv"))) == [text]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("id,body\n1,a\n", ":1: no text under 'text' (found: body, id)"),
        ("id;text\n1;a\n", ":1: no text under 'text' (found: id;text)"),
        ("text,text\na,b\n", ":1: two columns are named 'text'"),
        ("id,text\n1,a\n\n2,b,c\n", ":4: 3 values under 2 names"),
        ("id,text\n1\n", ":2: 1 values under 2 names"),
        ('id,text\n1,"a" b\n', ":2: not a row of a table"),
        ("id,text\n", ": holds no text"),
        ("", ": holds no text"),
    ],
)
def test_what_is_no_table_is_refused_by_line(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    with refused(f"{path}{problem}"):
        list(read_documents(str(path)))


def test_another_encoding_of_a_table_is_refused_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text\nok\ncafé\n".encode("latin-1"))
    with refused(f"{tmp_path / 'a.csv'}:3", "not UTF-8", "convert"):
        list(read_documents(str(tmp_path / "a.csv")))


# --- folders, patterns, several -----------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "b.jsonl",
        "a/z.jsonl.gz",
        "a/b/c.jsonl",
        ".hidden/x.txt",
        "a/.cache/y.csv",
        ".x.txt",
    ):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json_lines(name)
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return tmp_path / "texts"


def test_a_folder_is_its_files_in_order(folder: Path) -> None:
    documents = read_documents(str(folder))
    assert list(documents) == ["a/b/c.jsonl", "a/z.jsonl.gz", "b.jsonl"]
    assert not list(documents.notes)


def test_files_of_no_kind_of_text_in_a_folder_are_named(folder: Path) -> None:
    for number in range(5):
        (folder / f"README-{number}.md").write_text("text")
    documents = read_documents(str(folder))
    assert len(list(documents)) == 3
    (note,) = documents.notes
    named = ", ".join(f"{folder}/README-{number}.md" for number in range(3))
    assert note == f"{folder}: passed over {named} and 2 more, of no kind of text"


def test_a_pattern_is_its_files_in_order(folder: Path) -> None:
    assert list(read_documents(f"{folder}/**/*.jsonl")) == ["a/b/c.jsonl", "b.jsonl"]
    assert list(read_documents(f"{folder}/a/z*")) == ["a/z.jsonl.gz"]
    (folder / "[1].jsonl").write_bytes(json_lines("brackets"))
    assert list(read_documents(f"{folder}/[1].jsonl")) == ["brackets"]


def test_several_sources_follow_each_other(folder: Path) -> None:
    (folder / "a.csv").write_text("text\ncell\n")
    sources = (f"{folder}/b.jsonl", f"{folder}/a.csv", f"{folder}/a/*")
    assert list(read_documents(sources)) == ["b.jsonl", "cell", "a/z.jsonl.gz"]
    assert read_text(sources) == "b.jsonl\ncell\na/z.jsonl.gz"
    assert recorded(sources) == sources
    assert recorded(sources[:1]) == recorded(sources[0]) == sources[0]


def test_mixed_kinds_in_a_folder_or_pattern_are_refused(folder: Path) -> None:
    (folder / "a.txt").write_text("text")
    for source in (str(folder), f"{folder}/*"):
        with refused(source, "mixed kinds", "1 .txt", "'*.jsonl*'", "--data"):
            read_documents(source)


def test_a_file_beside_its_packed_copy_is_refused(folder: Path) -> None:
    (folder / "b.jsonl.zst").write_bytes(zstd(json_lines("b")))
    with refused(str(folder), f"{folder}/b.jsonl more than once", "keep one"):
        read_documents(str(folder))


def test_a_text_that_is_named_twice_is_refused(folder: Path) -> None:
    """Its documents would stand on both sides of a holdout."""
    with refused(f"{folder}/b.jsonl", "twice", "once"):
        read_documents((str(folder), f"{folder}/a/../b.jsonl"))
    with refused("hf:a", "twice"):
        read_documents(("hf:a", "hf:a"))


def test_names_without_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.md").write_text("text")
    with refused(f"{tmp_path}/empty: holds no file of text", ".jsonl"):
        read_documents(f"{tmp_path}/empty")
    with refused(f"{tmp_path}/other: holds no file of text ({tmp_path}/other/a.md)"):
        read_documents(f"{tmp_path}/other")
    with refused(f"{tmp_path}/*.jsonl: matches no file", "quote"):
        read_documents(f"{tmp_path}/*.jsonl")
    with refused(f"{tmp_path}/other/a.md: unknown kind"):
        read_documents(f"{tmp_path}/other/*")


# --- standard input -----------------------------------------------------------------------------


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def pipe(data: bytes) -> None:
        stream = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", stream)

    return pipe


@pytest.mark.parametrize("packing", ["", *PACK])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (CONTENTS[".jsonl"], TEXTS),
        ("\ufeff \n" + CONTENTS[".json"], TEXTS),
        ("[1] is a reference\n", ["[1] is a reference\n"]),
        (CSV, [CSV]),
    ],
    ids=["jsonl", "json", "text", "csv"],
)
def test_standard_input_tells_its_kind_and_is_read_again_in_the_same_run(
    piped: Callable[[bytes], None], packing: str, content: str, found: list[str]
) -> None:
    piped(PACK.get(packing, bytes)(content.encode()))
    assert next(read_documents("-")) == found[0]
    assert list(read_documents("-")) == found
    assert read_text("-") == ("" if len(found) == 1 else "\n").join(found)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_the_kind_of_standard_input_can_be_said(piped: Callable[[bytes], None], kind: str) -> None:
    piped(CONTENTS[f".{kind}"].encode())
    assert list(read_documents(f"-:{kind}")) == TEXTS
    assert next(read_documents("-:txt"))[:9] == CONTENTS[f".{kind}"][:9]


def test_standard_input_that_is_broken_is_refused(piped: Callable[[bytes], None]) -> None:
    packed = gzip.compress(json_lines(*(os.urandom(50).hex() for _ in range(100))))
    piped(packed[: len(packed) // 2])
    with refused("standard input: cut off after line"):
        list(read_documents("-"))
    piped(b'{"text": "a"}\n{\n')
    with refused("standard input:2: not valid JSON"):
        list(read_documents("-"))
    piped(b"")
    with refused("-: holds no text"):
        list(read_documents("-"))
    with refused("-:md: unknown kind", "-:jsonl"):
        read_documents("-:md")
    with refused("named twice"):
        read_documents(("-", "-:csv"))


def test_a_terminal_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with refused("terminal", "pipe text"):
        list(read_documents("-"))


def test_standard_input_is_refused_where_it_would_be_read_again() -> None:
    need_repeatable(("a.jsonl", "-a.txt"), "--resume", "collect anew")
    for source in ("-", "-:csv", ("a.jsonl", "-")):
        with refused("--resume cannot read standard input again", "collect anew"):
            need_repeatable(source, "--resume", "collect anew")


# --- a look before the run ----------------------------------------------------------------------


def test_a_look_meets_what_the_run_would_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(*["x" * 800] * 10) + b'{"text": null}\n' + b"{\n")
    notes: list[str] = []
    look_at_documents(str(path), "text", "none", 1000, notes.append)
    assert not notes
    with refused(f"{path}:12", "not valid JSON"):
        look_at_documents(str(path), "text", "none", 1001, notes.append)
    path.write_bytes(json_lines("a", "b") + b'{"text": null}\n')
    (tmp_path / "README.md").write_text("no text")
    look_at_documents(str(tmp_path), "text", "none", 1000, notes.append)
    (line,) = notes  # of rows the run has the last word
    assert line == f"{tmp_path}: passed over {tmp_path / 'README.md'}, of no kind of text"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "folder" / "b.txt")
    (tmp_path / "endless.jsonl").symlink_to("/dev/zero")
    with refused("b.txt: no plain file", "remove it"):
        read_text(str(tmp_path / "folder"))
    for name in ("folder/b.txt", "endless.jsonl"):
        with refused(f"{name}: no plain file", "--data -"):
            read_text(str(tmp_path / name))


def test_a_huge_file_without_lines_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "huge.jsonl"
    file.touch()
    os.truncate(file, 1 << 40)  # sparse: it takes no room
    with refused("huge.jsonl:1: longer than 134 MB"):
        read_text(str(file))
