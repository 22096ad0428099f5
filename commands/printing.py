"""What commands print: results to standard output, notes and warnings to standard error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import click


def note(line: str) -> None:
    """Print something worth knowing."""
    click.echo(f"note: {line}", err=True)


def warn(warnings: Iterable[str]) -> None:
    """Print what may turn out wrong."""
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)


def print_json(document: Mapping[str, Any]) -> None:
    """Print a result for programs."""
    echo(json.dumps(document, indent=1, ensure_ascii=False))


def echo(text: str) -> None:
    """Print text; a file name's bytes that are no characters come escaped, as JSON has them."""
    click.echo(text.encode("utf-8", "backslashreplace").decode())
