"""`psp report`: one HTML page of one or several runs, whole in itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.errors import ResultError
from common.files import refuse_existing, write_bytes
from report.formats import visible
from report.runs import Run, load_runs
from report.settings import ReportConfig
from results.bench import BENCH


def write_page(config: ReportConfig) -> list[Run]:
    """Write the page; the same results give the same bytes.

    Returns:
        What the page shows.

    Raises:
        PspError: a directory without results, a damaged result, or an output that exists.
    """
    if not config.directories:
        raise ResultError("no directory", f"name one that '{BENCH.maker}' made")
    refuse_existing(config.out, force=config.force)
    runs = load_runs(config.directories)
    write_bytes(config.out, render(runs).encode())
    return runs


def render(runs: Sequence[Run]) -> str:
    """Return the page of at least one run."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from report.sections import contents

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_seen,
    )
    return environment.get_template("page.html.j2").render(contents(runs))


def _seen(value: object) -> object:
    """Make every text of a result visible; pictures are markup and stay."""
    return visible(value) if type(value) is str else value
