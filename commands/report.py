"""`psp report`."""

from __future__ import annotations

import click

from commands.options import settings_options
from commands.printing import echo
from report.settings import ReportConfig


@click.command("report")
@settings_options(ReportConfig)
def report(config: ReportConfig) -> None:
    """Make one HTML page of the results in DIR…, several runs side by side.

    A DIR holds bench.json, report.json, evaluation.json, estimate.json, density.json or card.json,
    or directories that do.
    """
    from report.page import write_page

    write_page(config)
    echo(str(config.out))
