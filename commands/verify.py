"""`psp verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.options import PATH, Fraction, json_option
from commands.printing import echo, print_json


@click.command(short_help="Check that PowerInfer will run a file correctly.")
@click.argument("file", type=PATH, metavar="NAME.powerinfer.gguf")
@click.option(
    "--model", metavar="DIR|HUB_ID", help="Compare tensors, tokens and logits with this checkpoint."
)
@click.option(
    "--max-ppl-gap",
    type=Fraction(0, min_open=True),
    help="With --model: largest perplexity gap that passes, a fraction.",
)
@json_option
def verify(as_json: bool, file: Path, **options: Any) -> None:
    """Check a file against PowerInfer's contract; exit code 0 only if everything holds."""
    from powerinfer_bridge.verification import verification_table
    from powerinfer_bridge.verification import verify as run

    document = run(file, **options)
    if as_json:
        print_json(document)
    else:
        echo(verification_table(document))
    if not document["ok"]:
        raise click.exceptions.Exit(1)
