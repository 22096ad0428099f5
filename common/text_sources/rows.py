"""Rows of files of text, as objects by their keys.

Whatever a file is, a row is read when it is asked for; only a JSON array is read as a whole.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import chain

from common.errors import DataError, printable, reason
from common.text_sources.names import TextFile
from common.text_sources.streams import lines, of_known_kind
from common.units import decimal_size

TEXT_DOCUMENT_CHARACTERS = 16384
"""A .txt file is cut at blank lines into documents of at least this many characters, so that a
holdout by document exists for it too."""

LONGEST_TEXT_CHARACTERS = 65536
"""From here on a document of a .txt file ends with its line, so that a file without blank lines
is not held in memory as a whole."""

LONGEST_ARRAY = 1 << 30
"""Bytes of a JSON array, which is held in memory as a whole."""

LONGEST_RECORD = 1 << 27
"""Characters of a record of a table, which a quotation mark that is never closed would fill."""

Row = tuple[str, object]
"""Where it stands, for errors, and what it is."""

_PARQUET_ROWS = 64  # documents may be long
_PARQUET_BUFFER = 1 << 20
_QUOTE = "quote its texts as spreadsheets do, or write .jsonl"
_SHOWN = 200  # characters of a row's names; a hostile row has any number


def rows_of(file: TextFile, field: str) -> Iterator[Row]:
    """Yield the rows of a file.

    Args:
        file: any.
        field: key or column that is wanted; what plain text, tables and Parquet give holds no
            other.

    Raises:
        DataError: unreadable, another encoding, damaged, or a table without the column.
    """
    known = of_known_kind(file)
    if known.kind == ".txt":
        return _texts(known, field)
    if known.kind == ".jsonl":
        return _objects(enumerate(lines(known), 1), known.name, "mend the line")
    if known.kind == ".json":
        return _json(known)
    return _parquet(known, field) if known.kind == ".parquet" else _table(known, field)


def missing_column(names: Iterable[object], field: str, where: str) -> DataError:
    """Return the error of a place where there is no such key, which says what is there."""
    found = printable(", ".join(sorted(map(str, names))), _SHOWN)
    return DataError(f"{where}: no text under '{field}' (found: {found})", "name it with --field")


def _texts(file: TextFile, field: str) -> Iterator[Row]:
    held: list[str] = []
    characters = 0
    for number, line in enumerate(lines(file), 1):
        text = _decoded(line, file.name, number)
        held.append(text)
        characters += len(text)
        wanted = TEXT_DOCUMENT_CHARACTERS if text.isspace() else LONGEST_TEXT_CHARACTERS
        if characters >= wanted:
            yield file.name, {field: "".join(held)}
            held, characters = [], 0
    yield file.name, {field: "".join(held)}


def _decoded(line: bytes, name: str, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}:{number}: not UTF-8 ({error.reason})", "convert the file to UTF-8"
        ) from error


def _objects(numbered: Iterable[tuple[int, bytes]], name: str, remedy: str) -> Iterator[Row]:
    from msgspec import DecodeError
    from msgspec.json import Decoder

    decode = Decoder().decode
    for number, line in numbered:
        if line.isspace():
            continue
        try:
            value = decode(line)
        except (DecodeError, UnicodeDecodeError, RecursionError):
            text = _decoded(line, name, number)
            if text.isspace():
                continue
            value = _parsed(text, f"{name}:{number}", remedy)
        yield f"{name}:{number}", value


def _parsed(text: str, where: str, remedy: str) -> object:
    """Parse what the fast decoder refused, which is stricter: NaN, half a surrogate pair."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})", remedy) from error
    return value


def _json(file: TextFile) -> Iterator[Row]:
    numbered = enumerate(lines(file), 1)
    first = next((each for each in numbered if not each[1].isspace()), None)
    if first is None:
        return
    if not first[1].lstrip().startswith(b"["):
        remedy = "expected an array of objects, or an object a line"
        yield from _objects(chain([first], numbered), file.name, remedy)
        return
    text = _whole(file, chain([first], numbered))
    rows = _parsed(text, file.name, "mend the file")
    assert isinstance(rows, list)  # it starts with a bracket
    for number, row in enumerate(rows):
        yield f"{file.name} row {number}", row


def _whole(file: TextFile, numbered: Iterable[tuple[int, bytes]]) -> str:
    held: list[str] = []
    size = 0
    for number, line in numbered:
        held.append(_decoded(line, file.name, number))
        size += len(line)
        if size > LONGEST_ARRAY:
            raise DataError(
                f"{file.name}: a JSON array of more than {decimal_size(LONGEST_ARRAY)}",
                "write an object a line, as .jsonl",
            )
    return "".join(held)


class _Record(Iterator[str]):
    """Lines of a table, counted, of which a record may take so many characters and no more."""

    def __init__(self, file: TextFile) -> None:
        self._file, self._lines = file, lines(file)
        self.number, self.begun, self._size = 0, 1, 0

    def begin(self) -> None:
        """Say that what follows is a new record."""
        self.begun, self._size = self.number + 1, 0

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self._size += len(line)
        if self._size > LONGEST_RECORD:
            raise DataError(
                f"{self._file.name}:{self.begun}: a row longer than {decimal_size(LONGEST_RECORD)}",
                "close its quotation mark",
            )
        return _decoded(line, self._file.name, self.number)


def _table(file: TextFile, field: str) -> Iterator[Row]:
    """Read comma- or tab-separated rows as spreadsheets write them: names first, `"` quotes."""
    csv.field_size_limit(LONGEST_RECORD)  # the least that a text needs; it stands for all readers
    record = _Record(file)
    rows = csv.reader(record, delimiter="\t" if file.kind == ".tsv" else ",", strict=True)
    names: list[str] = []
    try:
        for row in rows:
            where = f"{file.name}:{record.begun}"
            record.begin()
            if names:
                yield where, {field: _cell(row, names, field, where)}
            else:
                names = _column_names(row, field, where)
    except csv.Error as error:
        raise DataError(
            f"{file.name}:{record.begun}: not a row of a table ({error})", _QUOTE
        ) from error


def _column_names(row: list[str], field: str, where: str) -> list[str]:
    if row and field not in row:
        raise missing_column(row, field, where)
    if row.count(field) > 1:
        raise DataError(f"{where}: two columns are named '{field}'", "rename one")
    return row


def _cell(row: list[str], names: list[str], field: str, where: str) -> str:
    if not row:  # a blank line
        return ""
    if len(row) != len(names):
        raise DataError(f"{where}: {len(row)} values under {len(names)} names", _QUOTE)
    return row[names.index(field)]


def _parquet(file: TextFile, field: str) -> Iterator[Row]:
    try:
        for number, value in enumerate(_parquet_values(file, field)):
            yield f"{file.name} row {number}", {field: value}
    except DataError:
        raise
    except Exception as error:
        # A damaged file shows itself in many kinds, in any of the library's layers.
        raise DataError(
            f"{file.name}: not a readable Parquet file ({reason(error)})",
            "fetch or write it again",
        ) from error


def _parquet_values(file: TextFile, field: str) -> Iterator[object]:
    from pyarrow import parquet

    # By default the library holds the whole column, or at least that of a row group, in memory.
    options = {"pre_buffer": False, "buffer_size": _PARQUET_BUFFER}
    with parquet.ParquetFile(file.place, **options) as opened:
        names = opened.schema_arrow.names
        if field not in names:
            raise missing_column(names, field, file.name)
        for batch in opened.iter_batches(_PARQUET_ROWS, columns=[field], use_threads=False):
            yield from batch.column(field).to_pylist()
