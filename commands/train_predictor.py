"""`psp train-predictor`."""

from __future__ import annotations

import click

from commands.options import json_option, settings_options, threads_option
from commands.printing import echo, note, print_json
from predictor.training.settings import AUTO, TrainConfig


@click.command("train-predictor")
@settings_options(TrainConfig)
@threads_option
@json_option
def train_predictor(config: TrainConfig, as_json: bool, threads: int) -> None:
    """Train, and measure on documents that training never saw."""
    from common.decisions import mean_metrics
    from common.table import layer_table
    from predictor.reporting.report import report_predictors
    from predictor.traces.store import TraceStore
    from predictor.training.run import train_predictors
    from report.figures.predictors import draw_report

    if config.hardware is not None and config.rank != AUTO:
        raise click.UsageError("--hardware goes with --rank auto")
    artifact = train_predictors(config, note)
    if config.report is not None:
        traces = TraceStore.open(config.traces)
        kind, force = config.predictor_type, config.force
        report_predictors(
            config.report, traces, artifact, draw=draw_report, predictor_type=kind, force=force
        )
    layers = artifact.rows()
    mean = mean_metrics(list(artifact.layers.values()))
    if as_json:
        names = {"predictors": artifact.path, "recipe": artifact.header.recipe["name"]}
        search = {"ranks": artifact.ranks, "search": artifact.search}
        return print_json({**names, **mean, **search, "layers": layers})
    echo(layer_table(layers, mean))
    if missing := artifact.missing:
        note(
            f"{len(missing)} layers are still missing, the first is {missing[0]}; train them "
            "with --resume, after collecting them if they were left out"
        )
