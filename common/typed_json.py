"""JSON documents as frozen dataclasses: a field's type says what stands in the file.

Types that a field may have: str, int, float (finite, whole numbers too), bool, None, `object` (any
value), Literal, a dataclass, unions with None, tuple[T, ...], tuple[T, U] of fixed length,
dict[str, T], and any of them as Annotated[T, Range(...)]. A field with a default may be missing;
keys that no field names are passed over.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from common.errors import PspError
from common.files import read_json

Document = TypeVar("Document")


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
        """Whether a number is within; sums of floats may end beside a limit."""
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


class JsonError(ValueError):
    """What in a document is not as its type says; the text names the place."""


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
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> Document:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        kind: the dataclass that it is read into.
        error: what is raised.
        remedy: how to get a good file.
        check: looks at the object before, to refuse other kinds and versions; raises `JsonError`.

    Raises:
        error: missing, damaged, or the first thing in it that does not fit.
    """
    found = read_json(path, error, remedy)
    try:
        if check is not None:
            check(found)
        return parse(kind, found)
    except JsonError as problem:
        raise error(f"{path}: {problem}", remedy) from problem


def plain(value: Any) -> Any:
    """Return a dataclass ready for JSON: its fields in order, nested ones too."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return str(value) if isinstance(value, Path) else value


def expect_kind(kind: str | None, version: int) -> Callable[[Mapping[str, Any]], None]:
    """Return a check that a document is of a kind (None: names none) and of a schema version."""

    def check(found: Mapping[str, Any]) -> None:
        for key, wanted in (("kind", kind), ("schema_version", version)):
            if wanted is not None and key not in found:
                raise JsonError(f"no '{key}'")
            if wanted is not None and found[key] != wanted:
                raise _wrong(key, repr(wanted), found[key])

    return check


def _wrong(where: str, expected: str, found: object) -> JsonError:
    return JsonError(f"'{where}': expected {expected}, found {found!r:.80}")


def _read(kind: Any, value: object, where: str) -> Any:
    origin = get_origin(kind)
    if origin is Annotated:
        inner, limits = get_args(kind)[:2]
        number = _read(inner, value, where)
        if number not in limits:
            raise _wrong(where, f"{_NAMES[inner]}{limits}", value)
        return number
    if origin in (Union, types.UnionType):
        return _optional(get_args(kind), value, where)
    if origin is Literal:
        if value not in get_args(kind):
            raise _wrong(where, " or ".join(map(repr, get_args(kind))), value)
        return value
    if origin is tuple:
        return _tuple(get_args(kind), value, where)
    if origin is dict:
        each = get_args(kind)[1]
        entries = _object(value, where).items()
        return {key: _read(each, found, _inside(where, key)) for key, found in entries}
    if dataclasses.is_dataclass(kind):
        return _dataclass(cast(type, kind), _object(value, where), where)
    if kind is object or kind is Any:
        return value
    return _scalar(kind, value, where)


_NAMES: dict[Any, str] = {
    float: "a number",
    int: "a whole number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
}


def _scalar(kind: type, value: object, where: str) -> object:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise _wrong(where, _NAMES[kind], value)


def _optional(kinds: tuple[Any, ...], value: object, where: str) -> Any:
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
    found = {}
    for field in dataclasses.fields(kind):
        place = _inside(where, field.name)
        if field.name in value:
            found[field.name] = _read(_hints(kind)[field.name], value[field.name], place)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise JsonError(f"no '{place}'")
    return kind(**found)
