"""`psp quickstart`."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import (
    PATH,
    choice_option,
    json_option,
    powerinfer_bin_option,
    seed_option,
    threads_option,
)
from commands.printing import echo, print_json


@click.command(short_help="Run the whole pipeline on a small model.")
@click.option(
    "--out",
    type=PATH,
    metavar="DIR",
    default=Path("quickstart-out"),
    show_default=True,
    help="Directory for everything that is made.",
)
@choice_option(
    "--size", ["tiny", "small"], "tiny: seconds, for trying. small: minutes.", default="small"
)
@seed_option
@threads_option
@powerinfer_bin_option
@json_option
def quickstart(
    out: Path, size: str, seed: int, threads: int, powerinfer_bin: Path | None, as_json: bool
) -> None:
    """Train a small ReGLU LLaMA and take it through all four commands.

    Text: the source of the Python standard library. A second run reuses finished steps.
    """
    from powerinfer_bridge.benchmark.table import bench_table
    from quickstart.pipeline import QuickstartConfig
    from quickstart.pipeline import quickstart as run

    config = QuickstartConfig(
        out=out, size=size, seed=seed, threads=threads, powerinfer_bin=powerinfer_bin
    )
    result, paths = run(config)
    if as_json:
        files = {name: str(path) for name, path in paths.all().items()}
        return print_json({**result, "files": files})
    echo(bench_table(result))
    echo("\nFiles")
    for name, path in paths.all().items():
        echo(f"  {name:<22} {path}")
