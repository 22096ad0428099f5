"""`psp train-predictor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.options import (
    PATH,
    Fraction,
    Layers,
    bound_options,
    choice_option,
    count_option,
    force_option,
    json_option,
    out_option,
    resume_option,
    seed_option,
    threads_option,
)
from commands.printing import echo, note, print_json


@click.command("train-predictor", short_help="Train a predictor for every layer.")
@click.option(
    "--traces", required=True, type=PATH, metavar="TRACES", help="Directory from psp collect."
)
@out_option("PREDICTORS", "Directory for the predictors.")
@choice_option(
    "--recipe",
    ["psp", "svd", "dejavu"],
    "psp: ours. svd: without training. dejavu: the published method.",
)
@bound_options
@click.option(
    "--hardware",
    metavar="NAME|FILE.yaml",
    help="With --rank auto: choose ranks for a model larger than the VRAM of this hardware (see "
    "psp estimate), where predictors' bytes cost less.  [default: every byte costs the same]",
)
@click.option(
    "--report", type=PATH, metavar="DIR", help="Also write metrics, curves and plots to DIR."
)
@click.option(
    "--holdout",
    type=Fraction(0, 0.9, min_open=True),
    default=0.1,
    show_default=True,
    help="Share of rows held out, by document.",
)
@click.option(
    "--label-top-fraction",
    type=Fraction(0, 1, min_open=True),
    help="Train on each token's largest activations only (0.15 is the published clipping).",
)
@click.option(
    "--layers",
    type=Layers(),
    metavar="0-7,12",
    help="Train these layers only; the rest later, with --resume.  [default: all]",
)
@choice_option(
    "--precision",
    ["auto", "float32", "bfloat16"],
    "Of training's matrix products; auto: bfloat16 on a GPU.",
)
@count_option(
    "--jobs",
    default=0,
    least=0,
    help_text="Layers trained at once, sharing the threads; 0: one a thread if they are small.",
)
@seed_option
@threads_option
@resume_option
@force_option
@json_option
def train_predictor(
    as_json: bool, threads: int, report: Path | None, hardware: str | None, **options: Any
) -> None:
    """Train, and measure on documents that training never saw."""
    from common.decisions import mean_metrics
    from common.table import layer_table
    from cost_model.hardware import load_hardware
    from predictor.reporting.report import report_predictors
    from predictor.traces.store import TraceStore
    from predictor.training.config import TrainConfig
    from predictor.training.run import train_predictors

    if hardware is not None:
        if options["rank"] != "auto":
            raise click.UsageError("--hardware goes with --rank auto")
        machine = load_hardware(hardware, threads)
        options["predictor_weight"] = machine.predictor_weight
        note(f"a predictor's byte costs {machine.predictor_weight:.2g} of a neuron's on {hardware}")
    config = TrainConfig(**options)
    artifact = train_predictors(config, note)
    if report is not None:
        traces = TraceStore.open(config.traces)
        kind, force = config.predictor_type, config.force
        report_predictors(report, traces, artifact, predictor_type=kind, force=force)
    layers = artifact.rows()
    mean = mean_metrics(list(artifact.layers.values()))
    if as_json:
        recipe = artifact.header.recipe["name"]
        search = {"ranks": artifact.ranks, "search": artifact.search}
        names = {"predictors": str(artifact.path), "recipe": recipe}
        document = {**names, **mean, **search, "layers": layers}
        return print_json(document)
    echo(layer_table(layers, mean))
    if missing := artifact.missing:
        click.echo(
            f"note: {len(missing)} layers are still missing, the first is {missing[0]}; train them "
            "with --resume, after collecting them if they were left out",
            err=True,
        )
