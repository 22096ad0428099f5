"""`psp quickstart`."""

from __future__ import annotations

import click

from commands.options import json_option, settings_options
from commands.printing import echo, note, print_json
from quickstart.settings import QuickstartConfig


@click.command()
@settings_options(QuickstartConfig)
@json_option
def quickstart(config: QuickstartConfig, as_json: bool) -> None:
    """Train a small ReGLU LLaMA and take it through all four commands.

    Text: the source of the Python standard library. A second run reuses finished steps.
    """
    from common.typed_json import plain
    from powerinfer_bridge.benchmark.table import bench_table
    from quickstart.pipeline import evaluated
    from quickstart.pipeline import quickstart as run

    result, paths = run(config)
    answers = evaluated(config, paths, note) if config.evaluate else None
    if as_json:
        told = {} if answers is None else {"evaluation": plain(answers)}
        return print_json({**plain(result), **told, "files": paths.all()})
    echo(bench_table(result))
    if answers is not None:
        from evaluation.table import evaluation_table

        echo(f"\n{evaluation_table(answers)}")
    echo("\nFiles")
    for name, path in paths.all().items():
        echo(f"  {name:<22} {path}")
    if answers is not None:
        echo(f"  {'answers':<22} {paths.evaluation}")
        echo(f"  {'page of all results':<22} {paths.page}")
