"""`psp sparsify`."""

from __future__ import annotations

from typing import Any

import click

from commands.options import json_option, settings_options, threads_option
from commands.printing import echo, note, print_json
from prosparse.settings import SparsifyConfig


def _scale(values: dict[str, Any]) -> None:
    scale = values.pop("scale")
    if scale is not None:
        values["schedule"] = values["schedule"].scaled(scale)


@click.command()
@settings_options(SparsifyConfig, before=_scale)
@click.option("--scale", type=float, help="Multiply all steps of the schedule, such as 0.01.")
@threads_option
@json_option
def sparsify(config: SparsifyConfig, as_json: bool, threads: int) -> None:
    """Replace a gated model's activation by ReLU and train it sparse, lambda rising in stages.

    For several GPUs start it with accelerate launch. Then psp sparsity measures the result.
    """
    from common.table import fact_table, layer_table
    from gguf_export.requirements import foresee
    from pipeline.provenance import Making
    from prosparse.training import is_main_process
    from prosparse.training import sparsify as run
    from prosparse.training_log import read_log
    from report.figures.training_curves import draw_training

    making = Making.begin(config)
    result = run(config, note, foresee)
    if not is_main_process():
        return None
    making.sparsified()
    draw_training(config.training, config.out.name, read_log(config.log))
    if as_json:
        return print_json(result)
    mean = {"activation_sparsity": result["activation_sparsity"]}
    echo(layer_table(result["layers"], mean))
    facts = {"held-out perplexity": f"{result['ppl']:.4f}", "steps": result["steps"]}
    echo("\n" + fact_table(facts | {"model": result["model"], "log": result["log"]}))
