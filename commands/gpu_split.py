"""`psp gpu-split`."""

from __future__ import annotations

import click

from commands.options import json_option, settings_options
from commands.printing import show
from gguf_export.settings import SplitConfig


@click.command("gpu-split")
@settings_options(SplitConfig)
@json_option
def gpu_split(config: SplitConfig, as_json: bool) -> None:
    """Write FILE.generated.gpuidx for a VRAM budget, from the statistics beside the file.

    PowerInfer loads it instead of running its own solver.
    """
    from gguf_export.gpu_split import split, split_table

    show(split(config), split_table, as_json=as_json)
