"""A valid document of any dataclass of `common.typed_json`, every optional part in it."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from common.typed_json import parse, plain

_SCALARS: dict[Any, object] = {str: "x", int: 1, float: 0.5, bool: True, type(None): None}


def example(kind: type[Any], **changes: object) -> dict[str, Any]:
    """Return a document that `common.typed_json.parse` takes for a dataclass.

    All texts are equal, so that what names another part of the document finds it.

    Args:
        kind: the dataclass.
        changes: fields that limits of others do not leave to chance, ready for JSON.

    Raises:
        JsonError: the dataclass has limits that no `changes` meets.
    """
    document = {name: _value(each) for name, each in _fields(kind)} | changes
    return typing.cast(dict[str, Any], plain(parse(kind, document)))


def _fields(kind: type[Any]) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return [(field.name, hints[field.name]) for field in dataclasses.fields(kind)]


def _value(kind: Any) -> Any:
    """Return a value of a type: of a union its first part, of an array two equal elements."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _value(inner[0])
    if origin in (Union, types.UnionType):
        return _value(next(each for each in inner if each is not type(None)))
    if origin is Literal:
        return inner[0]
    if origin is tuple:
        return [_value(each) for each in (inner[:1] * 2 if inner[-1] is Ellipsis else inner)]
    if origin is dict:
        return {"x": _value(inner[1])}
    if dataclasses.is_dataclass(kind):
        return {name: _value(each) for name, each in _fields(typing.cast(Any, kind))}
    return _SCALARS.get(kind, "x")
