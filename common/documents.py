"""Text sources as streams of documents: .txt, .jsonl, .json, .parquet, Hugging Face datasets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.chat import render
from common.errors import DataError, reason

TEXT_DOCUMENT_CHARACTERS = 16384
"""A .txt file is cut at blank lines into documents of at least this many characters, so that a
holdout by document exists for it too."""

LONGEST_TEXT_CHARACTERS = 65536
"""From here on a document of a .txt file ends with its line, so that a file without blank lines
is not held in memory as a whole."""

_PARQUET_ROWS = 64  # documents may be long
_PARQUET_BUFFER = 1 << 20
_LEAST_WORDS = 40  # of a paragraph of the sample
_SHOWN = 200  # characters of a row's names; a hostile row has any number


def read_documents(source: str, field: str = "text", template: str = "none") -> Iterator[str]:
    """Yield the non-empty documents of a source, in its own order.

    Rows are read as they are asked for; only a JSON array is read as a whole.

    Args:
        source: `FILE.txt`, `FILE.jsonl`, `FILE.json` (an array of objects, or an object a line),
            `FILE.parquet`, or `hf:NAME[:CONFIG][:SPLIT]`.
        field: key or column that holds the text, or with a template a list of messages.
        template: chat template of `common.chat` that every document is put into.

    Raises:
        DataError: missing file, unknown kind, wrong encoding, damage, missing field, a value that
            `common.chat.render` refuses, or no text at all.
    """
    empty = True
    for where, value in _open(source, field):
        document = render(value, template, where)
        try:
            document.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: holds half a surrogate pair", "mend the text") from error
        if document.strip():
            empty = False
            yield document
    if empty:
        raise DataError(f"{source}: holds no text", "pass a source with at least one document")


def read_text(source: str, field: str = "text") -> str:
    """Return a whole source as one text: a .txt file as it is, else its documents line by line.

    Raises:
        DataError: as `read_documents`.
    """
    separator = "" if source.endswith(".txt") else "\n"
    return separator.join(read_documents(source, field))


def sample_text() -> str:
    """Return English prose that every Python has: its reference's topics (`pydoc_data.topics`)."""
    from pydoc_data.topics import topics

    paragraphs: list[str] = []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            if len(paragraph.split()) >= _LEAST_WORDS:
                paragraphs.append(" ".join(paragraph.split()))
    return "\n".join(paragraphs)


def _open(source: str, field: str) -> Iterator[tuple[str, object]]:
    """Yield where each value stands, for errors, and the value."""
    if source.startswith("hf:"):
        return _dataset(source, field)
    path = Path(source)
    readers = {".txt": _text, ".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}
    if path.suffix not in readers:
        raise DataError(
            f"{source}: unknown kind of data",
            f"expected {', '.join(f'FILE{suffix}' for suffix in readers)} or hf:NAME",
        )
    if not os.path.isfile(path):
        raise DataError(f"{source}: no such file", "check --data")
    return readers[path.suffix](path, field)


def _lines(path: Path) -> Iterator[str]:
    number = 1
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for line in file:
                yield line
                number += 1
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 after line {number} ({error.reason})", "convert the file to UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", "check --data") from error


def _text(path: Path, field: str) -> Iterator[tuple[str, object]]:
    lines: list[str] = []
    characters = 0
    for line in _lines(path):
        lines.append(line)
        characters += len(line)
        wanted = LONGEST_TEXT_CHARACTERS if line.strip() else TEXT_DOCUMENT_CHARACTERS
        if characters >= wanted:
            yield str(path), "".join(lines)
            lines, characters = [], 0
    yield str(path), "".join(lines)


def _json_lines(
    path: Path, field: str, remedy: str = "mend the line"
) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield _field(_parse(line, where, remedy), field, where)


def _json(path: Path, field: str) -> Iterator[tuple[str, object]]:
    first = next((line for line in _lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _json_lines(path, field, "expected an array of objects, or an object a line")
        return
    rows = _parse("".join(_lines(path)), str(path), "mend the file")
    assert isinstance(rows, list)  # it starts with a bracket
    yield from _rows(rows, field, str(path))


def _parse(text: str, where: str, remedy: str) -> object:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})", remedy) from error
    return value


def _parquet(path: Path, field: str) -> Iterator[tuple[str, object]]:
    try:
        yield from _rows(_parquet_rows(path, field), field, str(path))
    except DataError:
        raise
    except Exception as error:
        # A damaged file shows itself in many kinds, in any of the library's layers.
        raise DataError(
            f"{path}: not a readable Parquet file ({reason(error)})", "fetch or write it again"
        ) from error


def _parquet_rows(path: Path, field: str) -> Iterator[dict[str, object]]:
    from pyarrow import parquet

    # By default the library holds the whole column, or at least that of a row group, in memory.
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_PARQUET_BUFFER) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise _missing(names, field, str(path))
        for batch in file.iter_batches(_PARQUET_ROWS, columns=[field], use_threads=False):
            for value in batch.column(field).to_pylist():
                yield {field: value}


def _rows(rows: Iterable[object], field: str, source: str) -> Iterator[tuple[str, object]]:
    for number, row in enumerate(rows):
        yield _field(row, field, f"{source} row {number}")


def _field(row: object, field: str, where: str) -> tuple[str, object]:
    if not isinstance(row, dict) or field not in row:
        raise _missing(row if isinstance(row, dict) else [type(row).__name__], field, where)
    value = row[field]
    if not isinstance(value, str | list):
        raise DataError(
            f"{where}: no text under '{field}' but {type(value).__name__}",
            "mend the row, or name another field with --field",
        )
    return f"{where} field '{field}'", value


def _missing(names: Iterable[object], field: str, where: str) -> DataError:
    found = ", ".join(sorted(map(str, names)))
    shown = found if len(found) <= _SHOWN else found[:_SHOWN] + "…"
    return DataError(f"{where}: no text under '{field}' (found: {shown})", "name it with --field")


def _dataset(source: str, field: str) -> Iterator[tuple[str, object]]:
    import datasets

    parts = source.split(":")[1:]
    if not 1 <= len(parts) <= 3 or not parts[0]:
        raise DataError(f"{source}: expected hf:NAME[:CONFIG][:SPLIT]")
    name, config, split = [*parts, "", ""][:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        yield from _rows(rows, field, source)
    except DataError:
        raise
    except Exception as error:
        # The library raises many kinds: no network, no such name, no such config or split.
        raise DataError(
            f"{source}: cannot be loaded ({reason(error)})", "check name and network"
        ) from error
