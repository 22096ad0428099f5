"""`psp bench-powerinfer`."""

from __future__ import annotations

from typing import Any

import click

from commands.options import (
    PATH,
    count_option,
    data_option,
    json_option,
    powerinfer_bin_option,
    threads_option,
)
from commands.printing import echo, print_json


@click.command("bench-powerinfer", short_help="Measure an exported file.")
@click.argument("file", type=PATH, metavar="NAME.powerinfer.gguf")
@powerinfer_bin_option
@data_option(required=False, help_text="Held-out text.  [default: prose shipped with Python]")
@count_option(
    "--ctx",
    "context",
    default=512,
    least=8,
    help_text="Perplexity window, tokens; at most the model's context.",
)
@count_option("--chunks", default=16, least=1, help_text="Perplexity windows, at most.")
@click.option("--prompt", default="The ", show_default=True, help="Text to continue.")
@count_option("-n", "generate", default=64, least=2, help_text="Tokens to generate.")
@count_option("--repeats", default=3, least=1, help_text="Runs of each kind.")
@threads_option
@json_option
def bench_powerinfer(as_json: bool, **options: Any) -> None:
    """Measure speed, sparsity and perplexity with predictors against all neurons."""
    from common.table import bench_table
    from powerinfer_bridge.benchmark import BenchConfig, bench

    result = bench(BenchConfig(**options))
    if as_json:
        return print_json(result)
    echo(bench_table(result))
