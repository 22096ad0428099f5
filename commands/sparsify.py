"""`psp sparsify`."""

from __future__ import annotations

from typing import Any

import click

from commands.options import (
    Fraction,
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
from commands.printing import echo, note, print_json


@click.command(short_help="Make a gated model sparse (ProSparse).")
@model_option
@data_option(required=True, help_text="Text to train on.")
@out_option("DIR", "Directory for the sparse model.")
@click.option(
    "--schedule",
    default="1b",
    show_default=True,
    metavar="1b|7b|13b|FILE.yaml",
    help="Stages and lambda: a published schedule or your own.",
)
@click.option("--scale", type=float, help="Multiply all steps of the schedule, such as 0.01.")
@click.option(
    "--sft-data", metavar="FILE|hf:NAME", help="Text of the sft stage.  [default: --data]"
)
@click.option(
    "--eval-data",
    metavar="FILE|hf:NAME",
    help="Held-out text for perplexity.  [default: the beginning of --data]",
)
@count_option("--eval-windows", least=1, default=32, help_text="Held-out windows, at most.")
@choice_option(
    "--activation", ["relu", "keep"], "keep: train on without substitution, to compare with."
)
@choice_option(
    "--norm", ["mean", "sum"], "L1 of a token in a layer: mean over neurons, or their sum."
)
@count_option("--context", least=2, default=1024, help_text="Length of a window, tokens.")
@count_option("--batch", least=1, default=8, help_text="Windows that a device takes at once.")
@count_option("--accumulate", least=1, default=1, help_text="Batches before a step.")
@click.option("--learning-rate", type=float, default=3e-5, show_default=True, help="Its peak.")
@choice_option(
    "--rate",
    ["cosine", "constant", "decay"],
    "Learning rate; decay: constant, then linear from the decay stage on.",
)
@click.option(
    "--warmup",
    type=Fraction(0, 1, max_open=True),
    default=0.01,
    show_default=True,
    help="Share of steps in which the learning rate rises from 0.",
)
@choice_option("--precision", ["float32", "bfloat16"], "Type of the passes; weights stay float32.")
@click.option("--checkpointing", is_flag=True, help="Recompute activations to save memory.")
@count_option("--save-every", least=1, default=500, help_text="Steps between checkpoints.")
@count_option("--log-every", least=1, default=10, help_text="Steps between lines of the log.")
@count_option("--eval-every", least=1, default=500, help_text="Steps between evaluations.")
@choice_option("--device", ["auto", "cpu"], "auto: GPUs if there are any.")
@seed_option
@threads_option
@resume_option
@force_option
@json_option
def sparsify(
    schedule: str, scale: float | None, as_json: bool, threads: int, **options: Any
) -> None:
    """Replace a gated model's activation by ReLU and train it sparse, lambda rising in stages.

    For several GPUs start it with accelerate launch. Then psp sparsity measures the result.
    """
    from common.table import fact_table, layer_table
    from prosparse.journal_file import read_log
    from prosparse.plots import draw_training
    from prosparse.schedule import find_schedule
    from prosparse.settings import SparsifyConfig
    from prosparse.training import is_main_process
    from prosparse.training import sparsify as run

    stages = find_schedule(schedule)
    stages = stages if scale is None else stages.scaled(scale)
    config = SparsifyConfig(schedule=stages, **options)
    result = run(config, note)
    if not is_main_process():
        return None
    draw_training(config.training, {config.out.name: read_log(config.log)})
    if as_json:
        return print_json(result)
    mean = {"activation_sparsity": result["activation_sparsity"]}
    echo(layer_table(result["layers"], mean))
    facts = {"held-out perplexity": f"{result['ppl']:.4f}", "steps": result["steps"]}
    echo("\n" + fact_table(facts | {"model": result["model"], "log": result["log"]}))
