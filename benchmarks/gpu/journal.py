"""What is known of a card so far: lines of JSON, each on the disk as soon as it is known."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import click

from benchmarks.gpu.kit import Figure
from common.errors import ResultError, printable
from common.files import write_error
from common.typed_json import JsonError, parse, plain
from results.card import CARD, Card, CardFigure, StepEnd


@dataclass(frozen=True, kw_only=True)
class _Head:
    machine: dict[str, object]
    dry: bool


@dataclass(frozen=True)
class Journal:
    """The lines in a directory."""

    directory: Path

    @property
    def path(self) -> Path:
        """The file."""
        return self.directory / "figures.jsonl"

    def begin(self, machine: dict[str, object], *, dry: bool) -> None:
        """Begin, or go on with what the same machine measured.

        Raises:
            ResultError: another machine did, or a dry run.
            OutputError: the system refused it.
        """
        head = plain(_Head(machine=machine, dry=dry))
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                empty = _whole_lines(file) == 0
        except OSError as error:
            raise write_error(self.path, error) from error
        if empty:
            self._append(head)
            return
        begun = plain(self._head())
        if begun != head:
            key = next(key for key in ("dry", *machine) if _get(begun, key) != _get(head, key))
            raise ResultError(
                f"{self.directory}: was begun with {key} {_get(begun, key)!r}, not "
                f"{_get(head, key)!r}",
                "pass another --out",
            )

    def figure(self, stage: str, step: str, figure: Figure) -> None:
        """Keep a figure and print it.

        Raises:
            ResultError: it holds what a file of results must not, such as NaN.
            OutputError: the system refused it.
        """
        known = CardFigure(
            stage=stage,
            step=step,
            name=figure.name,
            value=float(figure.value),
            unit=figure.unit,
            most=figure.most,
            least=figure.least,
            met=figure.met,
            details=dict(figure.details),
        )
        value = plain(known)
        try:
            parse(CardFigure, json.loads(json.dumps(value)))
        except JsonError as error:
            # Kept, it would make all of the file unreadable.
            raise ResultError(f"{printable(figure.name)}: {error}") from error
        self._tell(value)

    def end(self, end: StepEnd) -> None:
        """Keep how a step went and print it."""
        self._tell(plain(end))

    def card(self) -> Card:
        """Return what is known: of a step that ran more than once, what it found last.

        Raises:
            ResultError: a line that is none of ours.
        """
        head = self._head()
        figures: dict[tuple[str, str], list[CardFigure]] = {}
        ends: dict[tuple[str, str], StepEnd] = {}
        ended: set[tuple[str, str]] = set()
        for line in self._lines(1):
            key = (line.stage, line.step)
            if isinstance(line, CardFigure):
                if key in ended:
                    ended.remove(key)
                    figures[key] = []
                figures.setdefault(key, []).append(line)
            elif line.end != "left out":
                ended.add(key)
                ends[key] = line
            else:
                ends.setdefault(key, line)
        return Card(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            machine=head.machine,
            dry=head.dry,
            figures=tuple(figure for each in figures.values() for figure in each),
            steps=tuple(ends.values()),
        )

    def ends(self) -> list[StepEnd]:
        """Return how steps went, all of them in order."""
        return [line for line in self._lines(1) if isinstance(line, StepEnd)]

    def done(self) -> set[tuple[str, str]]:
        """Return stage and step of what need not run again."""
        return {(end.stage, end.step) for end in self.card().steps if end.end == "done"}

    def write(self) -> Path:
        """Write the document that `psp report` reads; return its path."""
        CARD.write(self.directory, self.card())
        return self.directory / CARD.name

    def _head(self) -> _Head:
        value = next(self._values(), None)
        try:
            return parse(_Head, value)
        except JsonError as error:
            raise self._damaged(1, error) from error

    def _lines(self, skip: int) -> Iterator[CardFigure | StepEnd]:
        for number, value in enumerate(self._values(), start=1):
            if number <= skip:
                continue
            try:
                yield parse(StepEnd if _get(value, "end") else CardFigure, value)  # type: ignore[misc]
            except JsonError as error:
                raise self._damaged(number, error) from error

    def _values(self) -> Iterator[Any]:
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                return  # cut off by a kill
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise self._damaged(number, error) from error

    def _damaged(self, number: int, error: Exception) -> ResultError:
        return ResultError(f"{self.path}: line {number}: {error}", "pass another --out")

    def _tell(self, value: object) -> None:
        self._append(value)
        with suppress(OSError):  # nobody reads any more
            click.echo(json.dumps(value))

    def _append(self, value: object) -> None:
        line = json.dumps(value).encode() + b"\n"
        try:
            with self.path.open("ab+") as file:
                _whole_lines(file)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(self.path, error) from error


def _whole_lines(file: BinaryIO) -> int:
    """Cut off what a kill or a full disk left of a line, and nothing else; return the bytes."""
    file.seek(0)
    lines = file.read()
    kept = lines.rfind(b"\n") + 1
    if kept < len(lines):
        file.truncate(kept)
    return kept


def _get(value: Any, key: str) -> Any:
    """Return what stands under a key of a document, or of its machine."""
    if not isinstance(value, dict):
        return None
    machine = value.get("machine")
    return value.get(key, machine.get(key) if isinstance(machine, dict) else None)
