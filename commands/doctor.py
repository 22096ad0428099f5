"""`psp doctor`."""

from __future__ import annotations

import click

from commands.options import json_option, settings_options
from commands.printing import echo, print_json
from powerinfer_bridge.doctor.settings import DoctorConfig


@click.command()
@settings_options(DoctorConfig)
@json_option
def doctor(config: DoctorConfig, as_json: bool) -> None:
    """Check that this machine can do the work; exit code 0 only if there is no problem."""
    from common.examination import findings_text
    from powerinfer_bridge.doctor.examination import examine

    examination = examine(config)
    if as_json:
        print_json(examination.document())
    else:
        echo(findings_text(examination))
    if not examination.healthy:
        raise click.exceptions.Exit(1)
