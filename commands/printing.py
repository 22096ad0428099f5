"""What commands print: results to standard output, notes and warnings to standard error."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

import click

from commands.streams import tell

Result = TypeVar("Result")


def note(line: str) -> None:
    """Print something worth knowing."""
    tell(f"note: {line}")


def warn(warnings: Iterable[str]) -> None:
    """Print what may turn out wrong."""
    for warning in warnings:
        tell(f"warning: {warning}")


def show(result: Result, text: Callable[[Result], str], *, as_json: bool) -> None:
    """Print a result for programs, or else as a text."""
    print_json(result) if as_json else echo(text(result))


def print_json(result: object) -> None:
    """Print a result, a dataclass or a document, for programs."""
    from common.typed_json import plain

    echo(json.dumps(plain(result), indent=1, ensure_ascii=not _in_utf8()))


def echo(text: str) -> None:
    """Print text; a file name's bytes that are no characters come escaped, as JSON has them."""
    click.echo(text.encode("utf-8", "backslashreplace").decode())


def _in_utf8() -> bool:
    """Whether standard output is in UTF-8, as everybody expects of JSON."""
    encoding = getattr(sys.stdout, "encoding", None)
    return encoding is not None and codecs.lookup(encoding).name == "utf-8"
