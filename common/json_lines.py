"""Journals: JSON objects, a line each, of which the first says what the others are of.

An entry is on disk once `append` returns. A last line without its end is what a killed process was
writing; it is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import OutputError
from common.files import write_bytes, write_error
from common.typed_json import parse, plain


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

    def reopen(self, file: Path, identity: Mapping[str, object]) -> list[bytes]:
        """Return the entries of a journal, each a line, ready for more.

        Raises:
            OutputError: it is none, of another kind, version or identity, or cannot be read.
        """
        try:
            content = file.read_bytes()
        except OSError as error:
            raise write_error(file, error) from error
        whole = content[: content.rfind(b"\n") + 1]
        first, *entries = whole.splitlines() or [b""]
        self._demand(file, first, identity)
        if whole != content:
            write_bytes(file, whole)
        return entries

    def damaged(self, file: Path, problem: str) -> OutputError:
        """Return the error of a journal that holds something else than it should."""
        return OutputError(f"{file}: {problem}", self.again)

    def _demand(self, file: Path, first: bytes, identity: Mapping[str, object]) -> None:
        try:
            head = parse(_Head, json.loads(first))
        except (ValueError, RecursionError):
            head = None
        if head is None or head.kind != self.kind:
            raise OutputError(f"{file}: is no {self.owner}'s journal", self.elsewhere)
        if head.schema_version != self.schema_version:
            raise OutputError(f"{file}: is of another version of psp", self.again)
        begun, now = _flat(head.identity), _flat(json.loads(line_of(identity)))
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
    return json.dumps(entry, ensure_ascii=True).encode() + b"\n"


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
