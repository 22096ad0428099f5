"""JSON documents as frozen dataclasses: a field's type says what stands in the file.

Types that a field may have: str, int, float (whole numbers too), bool, None, `object` (any value),
Literal, a dataclass, unions, tuple[T, ...], tuple[T, U] of fixed length, dict[str, T], and any of
them as Annotated[T, limits]. Limits are a `Range` or another object with `__contains__`, and with
`__str__` for what errors say was expected (of numbers, what follows `a number`). Numbers are
finite. A field with a default may be missing; keys that no field names are passed over, or refused
if the dataclass is `Closed`.

What fields must be to each other is for a dataclass's `__post_init__` to say, by `Misfit`.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
import sys
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from common.errors import PspError
from common.sealed import read_sealed

Document = TypeVar("Document")

_LARGEST = sys.float_info.max
_DEEPEST = 100
"""Levels of a value of any shape; deeper ones would overflow the stack of whoever writes them."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = 200

LEFT_OUT: Mapping[str, bool] = {"left out": True}
"""Metadata of a field that a document does not have where it is None."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Limits of a number.

    Attributes:
        low: the least that it may be, or what it must exceed if `open`.
        high: the largest.
        open: the number must be above `low`.
    """

    low: float = -math.inf
    high: float = math.inf
    open: bool = False

    def __contains__(self, number: float) -> bool:
        """Whether a number is within; sums of floats may end beside the largest."""
        above = number > self.low if self.open else number >= self.low
        return above and number <= self.high + 1e-6

    def __str__(self) -> str:
        """Return it as errors put it."""
        if self.open:
            return f" above {self.low:g}"
        if math.isinf(self.low) and math.isinf(self.high):
            return ""
        if math.isinf(self.high):
            return f" of at least {self.low:g}"
        return f" from {self.low:g} to {self.high:g}"


Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, open=True)]
Count = Annotated[int, Range(0)]


@dataclasses.dataclass(frozen=True)
class AtLeastOne:
    """Limits of an array that must not be empty.

    Attributes:
        what: an element, for errors.
    """

    what: str

    def __contains__(self, elements: tuple[object, ...]) -> bool:
        """Whether there is one."""
        return bool(elements)

    def __str__(self) -> str:
        """Return it as errors put it."""
        return f"at least one {self.what}"


class Closed:
    """What a dataclass is derived from that has no other keys than its fields."""


class JsonError(ValueError):
    """What in a document is not as its type says; the text names the place."""


class Misfit(ValueError):
    """A field of a dataclass that does not fit its others; raised by `__post_init__`."""

    def __init__(self, field: str, expected: str) -> None:
        """Say what was expected of a field."""
        self.field, self.expected = field, expected
        super().__init__(f"'{field}': expected {expected}")


def parse(kind: type[Document], value: object, where: str = "") -> Document:
    """Return a JSON value as its type has it.

    Args:
        kind: a dataclass.
        value: what `json.loads` returned.
        where: name of the value, the beginning of every place that errors name.

    Raises:
        JsonError: the first thing that does not fit, by its place such as `arms[0].decode`.
    """
    return cast(Document, _read(kind, value, where))


def read_document(
    path: Path,
    kind: type[Document],
    *,
    error: type[PspError],
    remedy: str,
    expected: Mapping[str, object] | None = None,
) -> Document:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        kind: the dataclass that it is read into.
        error: what is raised.
        remedy: how to get a good file.
        expected: what must stand under some keys before the rest counts, such as kind and version.

    Raises:
        error: missing, damaged, or the first thing in it that does not fit.
    """
    found = read_sealed(path, error, remedy)
    try:
        for key, wanted in (expected or {}).items():
            if key not in found:
                raise JsonError(f"no '{key}'")
            if not _equal(found[key], wanted):
                raise _wrong(key, repr(wanted), found[key])
        return parse(kind, found)
    except JsonError as problem:
        raise error(f"{path}: {problem}", remedy) from problem


def plain(value: Any) -> Any:
    """Return a dataclass ready for JSON: its fields in order, nested ones too."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {field: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {
            field.name: plain(each)
            for field, each in found.items()
            if each is not None or field.metadata != LEFT_OUT
        }
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return str(value) if isinstance(value, Path) else value


def _wrong(where: str, expected: str, found: object) -> JsonError:
    place = f"'{where}': " if where else ""
    return JsonError(f"{place}expected {expected}, found {_shown(found)}")


def _shown(found: object) -> str:
    """Return a short text; a value may hold itself, and a number may have too many digits."""
    try:
        return f"{_SHORT.repr(found):.80}"
    except ValueError:
        return f"a huge {type(found).__name__}"


def _read(kind: Any, value: object, where: str) -> Any:
    origin = get_origin(kind)
    if origin is Annotated:
        inner, limits = get_args(kind)[:2]
        found = _read(inner, value, where)
        if found not in limits:
            raise _wrong(where, f"{_NAMES.get(inner, '')}{limits}", value)
        return found
    if origin in (Union, types.UnionType):
        return _union(get_args(kind), value, where)
    if origin is Literal:
        return _literal(get_args(kind), value, where)
    if origin is tuple:
        return _tuple(get_args(kind), value, where)
    if origin is dict:
        each = get_args(kind)[1]
        entries = _object(value, where).items()
        return {key: _read(each, found, _inside(where, key)) for key, found in entries}
    if dataclasses.is_dataclass(kind):
        return _dataclass(cast(type, kind), _object(value, where), where)
    if kind is object:
        return _any(value, where)
    return _scalar(kind, value, where)


_NAMES: dict[Any, str] = {
    float: "a number",
    int: "a whole number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
}


def _scalar(kind: type, value: object, where: str) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number:
        return float(_finite(value, where))
    if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return _finite(value, where) if number else value
    raise _wrong(where, _NAMES[kind], value)


def _finite(number: Any, where: str) -> Any:
    """Refuse what no float holds: NaN, infinities and whole numbers of many digits."""
    if not abs(number) <= _LARGEST:
        raise _wrong(where, "a finite number", number)
    return number


def _any(value: object, where: str) -> object:
    """Take a value of any shape whose numbers are finite."""
    waiting = [(value, where, 0)]
    while waiting:
        each, place, depth = waiting.pop()
        if depth > _DEEPEST:
            raise JsonError(f"'{where}': expected at most {_DEEPEST} levels")
        if isinstance(each, dict):
            waiting += [(inner, _inside(place, key), depth + 1) for key, inner in each.items()]
        elif isinstance(each, list):
            waiting += [(inner, f"{place}[{at}]", depth + 1) for at, inner in enumerate(each)]
        elif isinstance(each, int | float):
            _finite(each, place)
    return value


def _literal(choices: tuple[object, ...], value: object, where: str) -> object:
    found = next((choice for choice in choices if _equal(value, choice)), None)
    if found is None:
        one = "one of " if len(choices) > 1 else ""
        raise _wrong(where, one + ", ".join(map(repr, choices)), value)
    return found


def _equal(value: object, wanted: object) -> bool:
    """Compare as JSON does, which tells true from 1."""
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _union(kinds: tuple[Any, ...], value: object, where: str) -> Any:
    """Read a union: null if it may be, else the first kind that fits."""
    others = [kind for kind in kinds if kind is not type(None)]
    if value is None and len(others) < len(kinds):
        return None
    for kind in others[:-1]:
        try:
            return _read(kind, value, where)
        except JsonError:
            continue
    return _read(others[-1], value, where)


def _tuple(kinds: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(where, "an array", value)
    if kinds[-1:] == (Ellipsis,):
        kinds = kinds[:1] * len(value)
    if len(value) != len(kinds):
        raise _wrong(where, f"{len(kinds)} elements", value)
    return tuple(
        _read(kind, each, f"{where}[{number}]")
        for number, (kind, each) in enumerate(zip(kinds, value, strict=True))
    )


def _object(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    return value


def _inside(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _dataclass(kind: type, value: Mapping[str, object], where: str) -> Any:
    fields = dataclasses.fields(kind)
    others = value.keys() - {field.name for field in fields}
    if others and issubclass(kind, Closed):
        known = ", ".join(field.name for field in fields)
        first = min(map(_shown, others)).strip("'")
        raise JsonError(f"'{_inside(where, first)}' is unknown, expected {known}")
    found = {}
    for field in fields:
        place = _inside(where, field.name)
        if field.name in value:
            found[field.name] = _read(_hints(kind)[field.name], value[field.name], place)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise JsonError(f"no '{place}'")
    try:
        return kind(**found)
    except Misfit as problem:
        place = _inside(where, problem.field)
        raise _wrong(place, problem.expected, value.get(problem.field)) from problem
