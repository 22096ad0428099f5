"""`psp sparsity`."""

from __future__ import annotations

import click

from commands.options import json_option, settings_options, threads_option
from commands.printing import echo, note, print_json
from prosparse.settings import SparsityConfig


@click.command()
@settings_options(SparsityConfig)
@threads_option
@json_option
def sparsity(config: SparsityConfig, as_json: bool, threads: int) -> None:
    """Measure sparsity and perplexity with ReLU and FATReLU; search a threshold on request."""
    from prosparse.expert_activity import activity_table, expert_activity, is_mixture
    from prosparse.sparsity import sparsity as measure
    from prosparse.sparsity import sparsity_table
    from prosparse.threshold_shift import shift

    if is_mixture(config.model):
        found = expert_activity(config, note)
        return print_json(found.document()) if as_json else echo(activity_table(found))
    if config.max_ppl_gap is not None:
        result = shift(config, note)
    elif config.per_layer or config.out is not None:
        raise click.UsageError("--per-layer and --out need --max-ppl-gap, the bound to search.")
    else:
        result = measure(config, note)
    if as_json:
        return print_json(result.document())
    echo(sparsity_table(result))
