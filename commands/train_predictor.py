"""`psp train-predictor`."""

from __future__ import annotations

from typing import ClassVar

import click

from commands.options import json_option, settings_options, threads_option
from commands.printing import echo, note, print_json
from commands.variants import WithVariants
from predictor.head.settings import HeadConfig
from predictor.training.settings import AUTO, TrainConfig

HEAD = "--head"


@click.command("train-predictor --head")
@settings_options(HeadConfig)
@threads_option
@json_option
def head(config: HeadConfig, as_json: bool, threads: int) -> None:
    """Train a predictor of the output head, for PowerInfer's second engine.

    It names the rows of the head that a token needs; measured on documents that training never saw.
    """
    from common.typed_json import plain
    from pipeline.provenance import Making
    from predictor.head.run import train_head
    from predictor.head.table import head_table

    making = Making.begin(config)
    artifact = train_head(config, note)
    making.head(artifact)
    if as_json:
        chosen = {**plain(artifact.chosen), "bytes_ratio": artifact.chosen.bytes_ratio}
        return print_json({"head": artifact.path, **chosen, "points": artifact.points})
    echo(head_table(artifact))


class _WithHead(WithVariants):
    variants: ClassVar[dict[str, click.Command]] = {HEAD: head}


@click.command("train-predictor", cls=_WithHead)
@settings_options(TrainConfig)
@click.option(
    HEAD,
    is_flag=True,
    expose_value=False,
    help="Train a predictor of the output head instead; it has options of its own: --head --help.",
)
@threads_option
@json_option
def train_predictor(config: TrainConfig, as_json: bool, threads: int) -> None:
    """Train, and measure on documents that training never saw."""
    from common.decisions import mean_metrics
    from common.table import layer_table
    from pipeline.provenance import Making
    from predictor.reporting.report import report_predictors
    from predictor.traces.store import TraceStore
    from predictor.training.run import train_predictors
    from report.figures.predictors import draw_report

    if config.hardware is not None and config.rank != AUTO:
        raise click.UsageError("--hardware goes with --rank auto")
    making = Making.begin(config)
    artifact = train_predictors(config, note)
    making.predictors(artifact, TraceStore.open(config.traces))
    if config.report is not None:
        traces = TraceStore.open(config.traces)
        report_predictors(config.report, traces, artifact, draw=draw_report, force=config.force)
    layers = artifact.rows()
    mean = mean_metrics(list(artifact.layers.values()))
    if as_json:
        names = {"predictors": artifact.path, "recipe": artifact.header.recipe["name"]}
        sizes = {"ranks": artifact.ranks, "types": artifact.types, "dense": artifact.dense}
        search = {**sizes, "search": artifact.search}
        return print_json({**names, **mean, **search, "layers": layers})
    echo(layer_table(layers, mean))
    if missing := artifact.missing:
        note(
            f"{len(missing)} layers are still missing, the first is {missing[0]}; train them "
            "with --resume, after collecting them if they were left out"
        )
