"""`psp gpu-split`."""

from __future__ import annotations

from typing import Any

import click

from commands.options import PATH, force_option, json_option, vram_options
from commands.printing import echo, print_json


@click.command("gpu-split", short_help="Choose which neurons live in VRAM.")
@click.argument("file", type=PATH, metavar="NAME.powerinfer.gguf")
@vram_options(required=True)
@force_option
@json_option
def gpu_split(as_json: bool, **options: Any) -> None:
    """Write FILE.generated.gpuidx for a VRAM budget, from the statistics beside the file.

    PowerInfer loads it instead of running its own solver.
    """
    from common.table import split_table
    from gguf_export.split_file import SplitConfig, split

    document = split(SplitConfig(**options))
    if as_json:
        return print_json(document)
    echo(split_table(document))
