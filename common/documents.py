"""Text sources as streams of documents: .txt, .jsonl and Hugging Face datasets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError

TEXT_DOCUMENT_CHARACTERS = 16384
"""A .txt file is cut at blank lines into documents of at least this many characters, so that a
holdout by document exists for it too."""


def read_documents(source: str, field: str = "text") -> Iterator[str]:
    """Yield the non-empty documents of a source, in its own order.

    Args:
        source: `FILE.txt`, `FILE.jsonl`, or `hf:NAME[:CONFIG][:SPLIT]`.
        field: key that holds the text in JSON lines and datasets.

    Raises:
        DataError: missing file, unknown kind, wrong encoding, missing field or no text at all.
    """
    empty = True
    for document in _open(source, field):
        if document.strip():
            empty = False
            yield document
    if empty:
        raise DataError(f"{source}: holds no text; pass a source with at least one document")


def read_text(source: str, field: str = "text") -> str:
    """Return a whole source as one text: a .txt file as it is, else its documents line by line.

    Raises:
        DataError: as `read_documents`.
    """
    separator = "" if source.endswith(".txt") else "\n"
    return separator.join(read_documents(source, field))


def _open(source: str, field: str) -> Iterator[str]:
    if source.startswith("hf:"):
        return _dataset(source, field)
    path = Path(source)
    readers = {".txt": _text, ".jsonl": _json_lines}
    if path.suffix not in readers:
        raise DataError(f"{source}: unknown kind of data; expected FILE.txt, FILE.jsonl or hf:NAME")
    if not os.path.isfile(path):
        raise DataError(f"{source}: no such file; check --data")
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
            f"{path}: not UTF-8 after line {number} ({error.reason}); convert the file to UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check --data") from error


def _text(path: Path, field: str) -> Iterator[str]:
    lines: list[str] = []
    characters = 0
    for line in _lines(path):
        lines.append(line)
        characters += len(line)
        if characters >= TEXT_DOCUMENT_CHARACTERS and not line.strip():
            yield "".join(lines)
            lines, characters = [], 0
    yield "".join(lines)


def _json_lines(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not valid JSON ({error}); mend the line") from error
        yield _field(row, field, f"{path}:{number}")


def _field(row: object, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if isinstance(text, str):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"{where}: '{field}' holds half a surrogate pair; mend the text")
        return text
    found = ", ".join(sorted(map(str, row))) if isinstance(row, dict) else type(row).__name__
    raise DataError(f"{where}: no text under '{field}' (found: {found}); name it with --field")


def _dataset(source: str, field: str) -> Iterator[str]:
    import datasets

    parts = source.split(":")[1:]
    if not 1 <= len(parts) <= 3 or not parts[0]:
        raise DataError(f"{source}: expected hf:NAME[:CONFIG][:SPLIT]")
    name, config, split = [*parts, "", ""][:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            yield _field(row, field, f"{source} row {number}")
    except DataError:
        raise
    except Exception as error:
        # The library raises many kinds: no network, no such name, no such config or split.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{source}: cannot be loaded ({reason}); check name and network") from error
