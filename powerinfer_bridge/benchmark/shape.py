"""Shapes of JSON documents, so that a damaged or foreign one is refused where it is wrong.

A shape is a type (`float` takes whole numbers too), a tuple of shapes of which one must fit, an
object's keys with a shape each, a list that holds one shape for all elements, `Exactly` for lists
of a fixed length, or `ANYTHING`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

ANYTHING = object()
NULL = type(None)


@dataclass(frozen=True)
class Exactly:
    """A list of `count` elements of one shape."""

    count: int
    element: Any


def problems(value: Any, shape: Any, where: str = "") -> Iterator[str]:
    """Yield what does not fit, by path; nothing if the value has the shape."""
    if shape is ANYTHING:
        return
    if isinstance(shape, dict):
        yield from _object(value, shape, where)
    elif isinstance(shape, list):
        yield from _list(value, shape[0], None, where)
    elif isinstance(shape, Exactly):
        yield from _list(value, shape.element, shape.count, where)
    elif isinstance(shape, tuple):
        found = [next(problems(value, each, where), None) for each in shape]
        if None not in found:
            # null aside, one shape is left as a rule, and its problem lies deeper
            yield next((each for each in found if each and value is not None), str(found[0]))
    elif not _is(value, shape):
        yield f"{where or 'document'}: expected {_name(shape)}, found {_name(type(value))}"


def _object(value: Any, shape: dict[str, Any], where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where or 'document'}: expected an object, found {_name(type(value))}"
        return
    for key in [*(shape.keys() - value.keys()), *(value.keys() - shape.keys())]:
        yield f"{where or 'document'}: {'lacks' if key in shape else 'has an unknown'} {key!r}"
    for key in shape.keys() & value.keys():
        yield from problems(value[key], shape[key], f"{where}.{key}" if where else key)


def _list(value: Any, element: Any, count: int | None, where: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"{where}: expected a list, found {_name(type(value))}"
    elif count is not None and len(value) != count:
        yield f"{where}: expected {count} elements, found {len(value)}"
    else:
        for number, each in enumerate(value):
            yield from problems(each, element, f"{where}[{number}]")


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def _name(kind: type) -> str:
    names = {float: "a finite number", int: "a whole number", str: "text", NULL: "null"}
    return names.get(kind, kind.__name__)
