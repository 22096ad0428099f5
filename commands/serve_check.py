"""`psp serve-check`."""

from __future__ import annotations

import os

import click

from commands.options import json_option, settings_options
from commands.printing import echo, print_json
from vllm_plugin.settings import ServeCheckConfig


@click.command()
@settings_options(ServeCheckConfig)
@json_option
def serve_check(config: ServeCheckConfig, as_json: bool) -> None:
    """Check whether vLLM will serve a model directory; exit code 0 only if there is no problem."""
    from vllm_plugin.check.examination import check_serving

    found = check_serving(config, os.environ)
    if as_json:
        print_json(found.document())
    else:
        echo(found.text())
    if not found.healthy:
        raise click.exceptions.Exit(1)
