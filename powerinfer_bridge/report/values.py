"""Values of a result file, each with the place where it stands, for errors that name it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import PspError
from common.files import read_json


class ResultError(PspError):
    """A result file that is missing, damaged or of another kind."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """A value of a JSON document.

    Attributes:
        found: what stands there.
        path: the file.
        key: where in the file, such as `arms[0].decode`; empty for the document itself.
        remedy: how to get a good file, the end of every error.
    """

    found: Any
    path: Path
    key: str
    remedy: str

    def wrong(self, expected: str) -> ResultError:
        """Return the error that something else was expected here."""
        shown = f"found {self.found!r:.80}"
        return ResultError(f"{self.path}: '{self.key}': expected {expected}, {shown}", self.remedy)

    def __getitem__(self, name: str) -> Value:
        """Return the value under a name.

        Raises:
            ResultError: this is no object, or has no such name.
        """
        if not isinstance(self.found, dict):
            raise self.wrong("an object")
        key = f"{self.key}.{name}" if self.key else name
        if name not in self.found:
            raise ResultError(f"{self.path}: no '{key}'", self.remedy)
        return self._inside(self.found[name], key)

    def get(self, name: str) -> Value | None:
        """Return the value under a name; None if there is none or it is null."""
        if isinstance(self.found, dict) and self.found.get(name) is None:
            return None
        return self[name]

    def items(self) -> list[Value]:
        """Return the elements of an array."""
        if not isinstance(self.found, list):
            raise self.wrong("an array")
        return [
            self._inside(value, f"{self.key}[{number}]") for number, value in enumerate(self.found)
        ]

    def entries(self) -> dict[str, Value]:
        """Return the values of an object by name."""
        if not isinstance(self.found, dict):
            raise self.wrong("an object")
        return {name: self[name] for name in self.found}

    def number(self, low: float = -math.inf, high: float = math.inf) -> float:
        """Return a number from `low` to `high`."""
        number = isinstance(self.found, int | float) and not isinstance(self.found, bool)
        if not number or not low <= self.found <= high:
            raise self.wrong("a number" + _limits(low, high))
        return float(self.found)

    def positive(self) -> float:
        """Return a number above 0."""
        if (number := self.number()) <= 0:
            raise self.wrong("a number above 0")
        return number

    def share(self) -> float:
        """Return a number from 0 to 1."""
        return self.number(0, 1 + 1e-6)  # sums of floats may end beside 1

    def text(self) -> str:
        """Return a text."""
        if not isinstance(self.found, str):
            raise self.wrong("a text")
        return self.found

    def truth(self) -> bool:
        """Return true or false."""
        if not isinstance(self.found, bool):
            raise self.wrong("true or false")
        return self.found

    def _inside(self, found: Any, key: str) -> Value:
        return Value(found=found, path=self.path, key=key, remedy=self.remedy)


def _limits(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return ""
    return f" of at least {low:g}" if math.isinf(high) else f" from {low:g} to {high:g}"


def open_result(path: Path, kind: str | None, remedy: str) -> Value:
    """Read a result file and check what it is.

    Args:
        path: the file.
        kind: expected `kind`; None for kinds that do not name themselves.
        remedy: how to get a good file.

    Raises:
        ResultError: missing, damaged, of another kind or schema, or with a number that no JSON has.
    """
    document = read_json(path, ResultError, remedy)
    whole = Value(found=document, path=path, key="", remedy=remedy)
    if kind is not None and whole["kind"].found != kind:
        raise whole["kind"].wrong(f"'{kind}'")
    if whole["schema_version"].found != 1:
        raise whole["schema_version"].wrong("1, which this psp reads")
    for value in _numbers(whole):
        if abs(value.found) > 1e300 or value.found != value.found:
            raise value.wrong("a finite number")
    return whole


def _numbers(whole: Value) -> Iterator[Value]:
    """Yield every number of a document, however deep it stands."""
    waiting = [whole]
    while waiting:
        value = waiting.pop()
        if isinstance(value.found, dict):
            waiting += value.entries().values()
        elif isinstance(value.found, list):
            waiting += value.items()
        elif isinstance(value.found, int | float):
            yield value
