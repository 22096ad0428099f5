"""`psp evaluate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from commands.options import json_option, settings_options, threads_option
from commands.printing import echo, note, print_json
from evaluation.settings import EvaluateConfig


@click.command()
@settings_options(EvaluateConfig)
@threads_option
@json_option
def evaluate(config: EvaluateConfig, as_json: bool, threads: int) -> None:
    """Ask a model and what is made of it the same questions, with lm-eval.

    Every request begins with BOS once. Answers are compared question by question.
    """
    from evaluation.run import evaluate as run
    from evaluation.table import evaluation_table
    from results.evaluation import EVALUATION

    with _kept(config.output_path):
        result = run(config, note)
    if as_json:
        print_json(result)
    else:
        echo(evaluation_table(result))
        if config.output_path is not None:
            echo(f"\nresults: {config.output_path / EVALUATION.name}")
    if result.unfinished:
        raise click.exceptions.Exit(1)


@contextmanager
def _kept(out: Path | None) -> Iterator[None]:
    """Say how to go on after an evaluation that ended early."""
    from common.errors import PspError
    from evaluation.answers import DIRECTORY

    try:
        yield
    except (KeyboardInterrupt, PspError):
        if out is not None and any((out / DIRECTORY).glob("*.jsonl")):
            note(f"answers are kept in {out / DIRECTORY}; the same with --resume goes on")
        raise
