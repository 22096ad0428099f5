"""`psp report`."""

from __future__ import annotations

from typing import Any

import click

from commands.options import PATH, force_option, out_option
from commands.printing import echo


@click.command("report", short_help="Make one HTML page of results.")
@click.argument("directories", type=PATH, metavar="DIR…", nargs=-1, required=True)
@out_option("FILE.html", "Page to write.")
@force_option
def report(**options: Any) -> None:
    """Make one HTML page of the results in DIR…, several runs side by side.

    A DIR holds bench.json, report.json, estimate.json or density.json, or directories that do.
    """
    from powerinfer_bridge.report.page import ReportConfig, write_page

    config = ReportConfig(**options)
    write_page(config)
    echo(str(config.out))
