"""What commands print: results to standard output, notes and warnings to standard error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TypeVar

import click

Result = TypeVar("Result")


def note(line: str) -> None:
    """Print something worth knowing."""
    click.echo(f"note: {line}", err=True)


def warn(warnings: Iterable[str]) -> None:
    """Print what may turn out wrong."""
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)


def show(result: Result, text: Callable[[Result], str], *, as_json: bool) -> None:
    """Print a result for programs, or else as a text."""
    print_json(result) if as_json else echo(text(result))


def print_json(result: object) -> None:
    """Print a result, a dataclass or a document, for programs."""
    from common.typed_json import plain

    echo(json.dumps(plain(result), indent=1, ensure_ascii=False))


def echo(text: str) -> None:
    """Print text; a file name's bytes that are no characters come escaped, as JSON has them."""
    click.echo(text.encode("utf-8", "backslashreplace").decode())
