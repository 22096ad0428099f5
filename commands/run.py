"""`psp run`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from commands.options import json_option, settings_options
from commands.printing import echo, note, print_json
from commands.streams import tell
from pipeline.settings import RunConfig


def _scale(values: dict[str, Any]) -> None:
    scale = values.pop("scale")
    if scale is not None:
        values["schedule"] = values["schedule"].scaled(scale)


@click.command()
@settings_options(RunConfig, before=_scale)
@click.option("--scale", type=float, help="Multiply all steps of the schedule, such as 0.01.")
@json_option
def run(config: RunConfig, as_json: bool) -> None:
    """Make, verify, measure and report a PowerInfer file of a checkpoint, with one command.

    Prints a plan first. The same command with --resume goes on after an interruption.
    """
    from common.typed_json import plain
    from pipeline.plan import plan_table, prepare
    from pipeline.run import execute, outcome_table

    prepared = prepare(config, note)
    if config.dry_run:
        return print_json(plain(prepared.plan)) if as_json else echo(plan_table(prepared.plan))
    tell(plan_table(prepared.plan))
    with _kept(config.out):
        outcome = execute(prepared, tell)
    if as_json:
        return print_json(outcome.document())
    echo(outcome_table(outcome))


@contextmanager
def _kept(out: Path) -> Iterator[None]:
    """Say how to go on after a run that ended early."""
    from common.errors import PspError
    from pipeline.state import STATE

    try:
        yield
    except (KeyboardInterrupt, PspError):
        if (out / STATE).exists():
            note(f"finished steps are kept in {out}; the same with --resume goes on")
        raise
