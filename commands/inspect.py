"""`psp inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import PATH, json_option
from commands.printing import show


@click.command()
@click.argument("file", type=PATH, metavar="FILE.gguf|HEAD")
@json_option
def inspect(file: Path, as_json: bool) -> None:
    """Print keys, tensors, types, predictor ranks and bytes by kind.

    Of a directory from train-predictor --head: what was measured.
    """
    from gguf_export.pwri.inspection import inspect_file, inspection_table
    from predictor.head.artifact import HeadArtifact
    from predictor.head.table import head_table

    if file.is_dir():
        return show(HeadArtifact.open(file), head_table, as_json=as_json)
    show(inspect_file(file), inspection_table, as_json=as_json)
