"""psp's commands in this process, as somebody would type them."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from typing import Any

import click

from common.errors import PspError


def psp(*words: object) -> dict[str, Any]:
    """Run a command with `--json`; return the document that it prints.

    Raises:
        PspError: what the command would tell its user.
    """
    from cli import main

    said = io.StringIO()
    try:
        with redirect_stdout(said):
            main.main([*map(str, words), "--json"], standalone_mode=False)
    except click.ClickException as error:
        raise PspError(error.format_message()) from error
    found: dict[str, Any] = json.loads(said.getvalue())
    return found
