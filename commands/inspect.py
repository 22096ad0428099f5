"""`psp inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import PATH, json_option
from commands.printing import show


@click.command()
@click.argument("file", type=PATH, metavar="FILE.gguf")
@json_option
def inspect(file: Path, as_json: bool) -> None:
    """Print keys, tensors, types, predictor ranks and bytes by kind."""
    from gguf_export.pwri.inspection import inspect_file, inspection_table

    show(inspect_file(file), inspection_table, as_json=as_json)
