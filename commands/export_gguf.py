"""`psp export-gguf`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.options import json_option, settings_options
from commands.printing import echo, note, print_json, warn
from gguf_export.settings import POWERINFER, ExportConfig

if TYPE_CHECKING:
    from gguf_export.contract import Report
    from powerinfer_bridge.verify.verification import ExportCheck


def _choose(values: dict[str, Any]) -> None:
    """Take the predictors that were passed, by one name or the other."""
    imported = values.pop("import_predictors_from")
    if values["engine"] == POWERINFER and values["predictors"] is None and imported is None:
        hint = "'--predictors' or '--import-predictors-from'"
        raise click.MissingParameter(param_type="option", param_hint=hint)
    if values["predictors"] is not None and imported is not None:
        raise click.UsageError("Pass --predictors or --import-predictors-from, not both.")
    values["predictors"] = values["predictors"] or imported


def _report(check: ExportCheck | None) -> Report | None:
    """Return what was found of a file, None of one that was not looked at."""
    return None if check is None else check.report


@click.command("export-gguf")
@settings_options(ExportConfig, before=_choose)
@click.option(
    "--import-predictors-from",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.gguf",
    help="Instead of --predictors: take those in a GGUF file, such as a published one.",
)
@click.option("--no-verify", is_flag=True, help="Skip the check of the written file.")
@json_option
def export_gguf(config: ExportConfig, as_json: bool, no_verify: bool) -> None:
    """Write the model with its predictors, PowerInfer's predictor directory and statistics.

    The file is verified before it gets its name; one that fails is not kept.
    """
    from common.typed_json import plain
    from gguf_export.bundle import Bundle, dense_beside, export
    from gguf_export.dense import SingleFile, export_single
    from gguf_export.gpu_split import split, split_table
    from powerinfer_bridge.verify.verification import ExportCheck

    check = None if no_verify else ExportCheck(config.model, config.out)
    dense_check = None if no_verify else ExportCheck(config.model, dense_beside(config.out))
    if config.engine == POWERINFER:
        bundle: Bundle | SingleFile = export(config, check, dense_check)
    else:
        bundle = export_single(config, check)
    warn(bundle.warnings)
    for each in (check, dense_check):
        if each is not None and each.hint:
            note(each.hint)
    report, dense_report = _report(check), _report(dense_check)
    chosen = None if config.split is None else split(config.split)
    if as_json:
        document = {
            **bundle.outputs,
            "warnings": bundle.warnings,
            "verified": None if report is None else report.document(),
            **({} if dense_report is None else {"dense_verified": dense_report.document()}),
            **({} if chosen is None else plain(chosen)),
        }
        return print_json(document)
    counts = (None if found is None else len(found.checks) for found in (report, dense_report))
    echo(bundle.table(*counts))
    if chosen is not None:
        echo(f"\n{split_table(chosen)}")
