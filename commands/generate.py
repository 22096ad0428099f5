"""`psp generate`."""

from __future__ import annotations

import click

from commands.options import json_option, settings_options
from commands.printing import note, show
from sparse_operators.settings import GenerateConfig


@click.command()
@settings_options(GenerateConfig)
@json_option
def generate(config: GenerateConfig, as_json: bool) -> None:
    """Continue a text greedily, exactly, without a predictor.

    The model runs in transformers, dense and with its FFNs replaced, by turns.
    """
    from sparse_operators.generation import generate as run
    from sparse_operators.generation import report

    show(run(config, note), report, as_json=as_json)
