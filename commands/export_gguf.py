"""`psp export-gguf`."""

from __future__ import annotations

from typing import Any

import click

from commands.options import (
    force_option,
    json_option,
    model_option,
    out_option,
    predictors_option,
    types_options,
    vram_options,
)
from commands.printing import echo, print_json, warn


@click.command("export-gguf", short_help="Write files that PowerInfer runs.")
@model_option
@predictors_option
@out_option("NAME.powerinfer.gguf", "Model file; the rest of the bundle is written beside it.")
@types_options
@click.option(
    "--dense",
    is_flag=True,
    help="Also write NAME.dense.gguf, to time against; for arch llama its text is wrong.",
)
@vram_options(required=False)
@click.option("--no-verify", is_flag=True, help="Skip the check of the written file.")
@force_option
@json_option
def export_gguf(
    as_json: bool,
    no_verify: bool,
    vram_budget: str | None,
    context: int,
    kv_type: str,
    **options: Any,
) -> None:
    """Write the model with its predictors, PowerInfer's predictor directory and statistics.

    The file is verified before it gets its name; one that fails is not kept.
    """
    from common.table import export_table
    from gguf_export.bundle import ExportConfig, export
    from gguf_export.split_file import SplitConfig, split
    from powerinfer_bridge.verification import ExportCheck

    config, split_config = ExportConfig(**options, split=vram_budget is not None), None
    if vram_budget is not None:
        split_config = SplitConfig(
            file=config.out, vram_budget=vram_budget, context=context, kv_type=kv_type
        )
    check = None if no_verify else ExportCheck(config.model, config.out)
    bundle = export(config, check)
    warn(bundle.warnings)
    if check is not None and check.hint:
        click.echo(f"note: {check.hint}", err=True)
    document = {
        **bundle.document(),
        "verified": check and check.document,
        **({} if split_config is None else split(split_config)),
    }
    if as_json:
        return print_json(document)
    echo(export_table(document))
