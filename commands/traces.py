"""`psp traces`."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import TRACES, json_option
from commands.printing import echo, print_json
from common.urls import Url


@click.group()
def traces() -> None:
    """Print or verify traces, in a directory or at s3://."""


@traces.command("info", short_help="Print what a store holds.")
@click.argument("traces", type=TRACES, metavar="TRACES")
@json_option
def traces_info(traces: Path | Url, as_json: bool) -> None:
    """Print what traces were made from, how far they are, and every layer's sparsity."""
    from common.table import fact_table, layer_table
    from predictor.traces.store import TraceStore
    from predictor.traces.summary import trace_summary

    summary = trace_summary(TraceStore.open(traces))
    if as_json:
        return print_json(summary)
    layers = summary.pop("layers")
    echo(fact_table(summary))
    if layers:
        echo("\n" + layer_table(layers, None))


@traces.command("check", short_help="Verify every file of a store.")
@click.argument("traces", type=TRACES, metavar="TRACES")
@json_option
def traces_check(traces: Path | Url, as_json: bool) -> None:
    """Verify checksums, shapes and counts; exit code 1 at the first file that is wrong."""
    from predictor.traces.store import TraceStore
    from predictor.traces.summary import check_traces

    result = check_traces(TraceStore.open(traces))
    if as_json:
        return print_json(result)
    state = "complete" if result["complete"] else "interrupted, go on with 'psp collect --resume'"
    echo(f"{traces}: {result['files']} files of {result['tokens']} tokens are whole; {state}")
