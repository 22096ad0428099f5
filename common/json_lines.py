"""Journals: JSON objects, a line each, of which the first says what the others are of.

An entry is on disk once `append` returns. A last line without its end is what a killed process was
writing; it is dropped. Each line has a checksum as documents have it, see `common.sealed`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import OutputError
from common.files import LARGEST_DOCUMENT, opened, write_bytes, write_error
from common.sealed import sealed, unsealed
from common.typed_json import JsonError, parse, plain


@dataclass(frozen=True, kw_only=True)
class _Head:
    """The first line."""

    kind: str
    schema_version: int
    identity: object


@dataclass(frozen=True, kw_only=True)
class JournalKind:
    """What all journals of one kind have in common.

    Attributes:
        kind: how their first line names it.
        schema_version: of their entries.
        owner: whose they are, for errors, such as `benchmark`.
        again: how to begin anew, for remedies.
        elsewhere: how to leave it alone, likewise.
    """

    kind: str
    schema_version: int
    owner: str
    again: str
    elsewhere: str

    def begin(self, file: Path, identity: Mapping[str, object]) -> None:
        """Write a journal without entries.

        Args:
            file: its path.
            identity: what is measured with what, ready for JSON; only the same goes on.

        Raises:
            OutputError: it cannot be written.
        """
        head = _Head(kind=self.kind, schema_version=self.schema_version, identity=identity)
        write_bytes(file, line_of(plain(head)))

    def reopen(self, file: Path, identity: Mapping[str, object]) -> list[dict[str, Any]]:
        """Return the entries of a journal, which is ready for more then.

        Raises:
            OutputError: it is none, of another kind, version or identity, a line of it is damaged,
                or it cannot be read.
        """
        entries: list[dict[str, Any]] = []
        kept = 0
        with opened(file, OutputError, self.elsewhere) as stream:
            for number, line in enumerate(iter(lambda: stream.readline(LARGEST_DOCUMENT), b""), 1):
                last = not line.endswith(b"\n") and number > 1 and not stream.read(1)
                if last and not outlasts_its_object(line):
                    break  # unfinished
                entry = self._entry(file, line, number)
                if number == 1:
                    self._demand(file, entry, identity)
                else:
                    entries.append(entry)
                kept += len(line)
            unfinished = stream.seek(0, os.SEEK_END) > kept
        if not kept:
            raise self._none(file)
        if unfinished:
            _cut(file, kept)
        return entries

    def damaged(self, file: Path, problem: str) -> OutputError:
        """Return the error of a journal that holds something else than it should."""
        return OutputError(f"{file}: {problem}", self.again)

    def damaged_line(self, file: Path, number: int) -> OutputError:
        """Return the error of a line, counted from 1."""
        return self.damaged(file, f"line {number} is damaged")

    def _entry(self, file: Path, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            raise self._none(file) if number == 1 else self.damaged_line(file, number)
        try:
            return unsealed(entry)
        except ValueError as error:
            raise self.damaged_line(file, number) from error

    def _none(self, file: Path) -> OutputError:
        return OutputError(f"{file}: is no {self.owner}'s journal", self.elsewhere)

    def _demand(self, file: Path, first: object, identity: Mapping[str, object]) -> None:
        try:
            head = parse(_Head, first)
        except JsonError as error:
            raise self._none(file) from error
        if head.kind != self.kind:
            raise self._none(file)
        if head.schema_version != self.schema_version:
            raise OutputError(f"{file}: is of another version of psp", self.again)
        begun, now = _flat(head.identity), _flat(json.loads(json.dumps(identity)))
        for key in [*begun, *now]:
            if begun.get(key) != now.get(key):
                raise OutputError(
                    f"{file}: was begun with {key} {begun.get(key)}, now it is {now.get(key)}",
                    f"go back to that, {self.again}, or {self.elsewhere}",
                )


def append(file: Path, entry: Mapping[str, object]) -> None:
    """Add an entry and sync it to disk; of one that the system refused nothing stays.

    Raises:
        OutputError: the system refused it.
    """
    try:
        with file.open("ab", buffering=0) as stream:
            start, rest = stream.seek(0, os.SEEK_END), line_of(entry)
            try:
                while rest:
                    rest = rest[stream.write(rest) :]
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(start)
                raise
    except OSError as error:
        raise write_error(file, error) from error


def line_of(entry: Mapping[str, object]) -> bytes:
    """Return an entry's line; bytes of a prompt that are no characters stay as ASCII escapes."""
    return json.dumps(sealed(entry), ensure_ascii=True).encode() + b"\n"


def outlasts_its_object(rest: bytes) -> bool:
    """Whether a line without its end holds more than an object.

    A process that was killed in it has not written more: the end is damaged, or what follows is.
    """
    try:
        _, end = json.JSONDecoder().raw_decode(text := rest.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return False
    return end < len(text)


def _cut(file: Path, size: int) -> None:
    try:
        os.truncate(file, size)
    except OSError as error:
        raise write_error(file, error) from error


def _flat(value: object, name: str = "") -> dict[str, object]:
    """Return the leaves of nested objects and arrays by their path."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {name: value}
    return {
        path: leaf
        for key, inner in items
        for path, leaf in _flat(inner, f"{name}.{key}" if name else str(key)).items()
    }
