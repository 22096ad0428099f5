"""`psp verify`."""

from __future__ import annotations

import click

from commands.options import json_option, settings_options
from commands.printing import echo, note, print_json
from powerinfer_bridge.verify.settings import VerifyConfig


@click.command()
@settings_options(VerifyConfig)
@json_option
def verify(config: VerifyConfig, as_json: bool) -> None:
    """Check a file against PowerInfer's contract; exit code 0 only if everything holds."""
    from powerinfer_bridge.verify.verification import verification_table
    from powerinfer_bridge.verify.verification import verify as run

    report = run(config.file, config.model, max_ppl_gap=config.max_ppl_gap, note=note)
    if as_json:
        print_json(report.document())
    else:
        echo(verification_table(report))
    if not report.ok:
        raise click.exceptions.Exit(1)
