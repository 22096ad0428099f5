"""`psp collect`."""

from __future__ import annotations

import click

from commands.options import json_option, settings_options, threads_option
from commands.printing import echo, note, print_json
from commands.streams import tell
from predictor.collection.settings import CollectConfig


@click.command()
@settings_options(CollectConfig)
@threads_option
@json_option
def collect(config: CollectConfig, as_json: bool, threads: int) -> None:
    """Record, for every layer and token, the predictor's input and the active neurons."""
    from common.table import layer_table
    from gguf_export.requirements import foresee
    from pipeline.provenance import Making
    from predictor.collection.collect import collect as run
    from predictor.traces.summary import trace_summary

    making = Making.begin(config)
    store = run(config, tell, foresee)
    making.traces(store)
    summary = trace_summary(store)
    if as_json:
        return print_json(summary)
    if store.rows < store.header.tokens:
        note(f"the data ended after {store.rows} tokens")
    echo(layer_table(summary["layers"], None))
    echo(f"\n{store.rows} tokens of {store.documents} documents in {store}")
