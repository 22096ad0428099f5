"""`psp verify`."""

from __future__ import annotations

from typing import Any

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

    given: dict[str, Any] = {}
    if config.ray is not None:
        from powerinfer_bridge.verify.nodes import compare_on_nodes

        given["compare"] = compare_on_nodes(config, note)
    report = run(config.file, config.model, max_ppl_gap=config.max_ppl_gap, note=note, **given)
    if as_json:
        print_json(report.document())
    else:
        echo(verification_table(report))
    if not report.ok:
        raise click.exceptions.Exit(1)
