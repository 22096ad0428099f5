"""`psp bench-operators`."""

from __future__ import annotations

import click

from commands.options import json_option, settings_options, threads_option
from commands.printing import show
from sparse_operators.settings import OperatorBenchConfig


@click.command("bench-operators")
@settings_options(OperatorBenchConfig)
@threads_option
@json_option
def bench_operators(config: OperatorBenchConfig, as_json: bool, threads: int) -> None:
    """Measure S2, S3 and the FFN made of them against dense products, one token or some at a time.

    Dense and sparse run by turns on weights that no cache holds.
    """
    from sparse_operators.benchmark import bench_operators as run
    from sparse_operators.benchmark import operator_table

    show(run(config), operator_table, as_json=as_json)
