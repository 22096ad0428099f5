"""`psp collect`."""

from __future__ import annotations

from typing import Any

import click

from commands.options import (
    Layers,
    choice_option,
    count_option,
    data_option,
    force_option,
    json_option,
    model_option,
    out_option,
    resume_option,
    seed_option,
    threads_option,
)
from commands.printing import echo, print_json


@click.command(short_help="Record activation traces of a model.")
@model_option
@data_option(required=True, help_text="Text to run the model on.")
@out_option("TRACES", "Directory for the traces.")
@count_option("--tokens", required=True, least=1, help_text="Tokens to record, in all.")
@count_option("--context", default=512, least=2, help_text="Longest window, tokens.")
@count_option("--batch", default=8, least=1, help_text="Windows run at once.")
@choice_option("--dtype", ["float16", "bfloat16"], "How predictor inputs are stored.")
@choice_option(
    "--importance-bits",
    ["0", "2", "4", "8"],
    "Bits an active neuron's importance takes; 8 can rank neurons, 0 stores none.",
    default="2",
    callback=lambda ctx, parameter, value: int(value),
)
@click.option(
    "--layers",
    type=Layers(),
    metavar="0-7,12",
    help="Record these layers only, to go through the model in passes.  [default: all]",
)
@choice_option(
    "--chat-template",
    ["auto", "none", "minicpm"],
    "Put text in a chat model's format; auto: the model's own if psp knows it.",
)
@choice_option(
    "--weights",
    ["auto", "resident", "streamed"],
    "Keep the model on the device, or read it block by block; auto: as it fits.",
)
@click.option("--device", default="cpu", show_default=True, help="Torch device of the model.")
@seed_option
@threads_option
@resume_option
@force_option
@json_option
def collect(as_json: bool, threads: int, **options: Any) -> None:
    """Record, for every layer and token, the predictor's input and the active neurons."""
    from common.table import layer_table
    from predictor.collection.collect import CollectConfig
    from predictor.collection.collect import collect as run
    from predictor.traces.summary import trace_summary

    store = run(CollectConfig(**options), lambda line: click.echo(line, err=True))
    summary = trace_summary(store)
    if as_json:
        return print_json(summary)
    if store.rows < store.header.tokens:
        click.echo(f"note: the data ended after {store.rows} tokens", err=True)
    echo(layer_table(summary["layers"], None))
    echo(f"\n{store.rows} tokens of {store.documents} documents in {store.path}")
