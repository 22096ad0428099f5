"""`psp bench-operators`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.options import json_option, settings_options, threads_option
from commands.printing import echo, print_json
from sparse_operators.settings import SHAPES, MeasureConfig

if TYPE_CHECKING:
    from torch import Tensor

    from sparse_operators.benchmark import OperatorBenchConfig

_TRACED_TOKENS = 1024
"""Tokens of a layer to draw masks from, spread over the traces."""


@click.command("bench-operators", short_help="Measure the sparse FFN operators.")
@settings_options(MeasureConfig)
@threads_option
@json_option
def bench_operators(config: MeasureConfig, as_json: bool, threads: int) -> None:
    """Measure S2, S3 and the FFN made of them against dense products, one token at a time.

    Dense and sparse run by turns on weights that no cache holds.
    """
    from sparse_operators.benchmark import bench_operators as run
    from sparse_operators.benchmark_table import operator_table

    document = run(_config(config))
    if as_json:
        return print_json(document)
    echo(operator_table(document))


def _config(config: MeasureConfig) -> OperatorBenchConfig:
    import torch

    from architectures.model import check_device
    from sparse_operators.benchmark import OperatorBenchConfig
    from sparse_operators.patterns import RUNS

    check_device(config.device)
    if torch.device(config.device).type not in ("cpu", "cuda"):
        raise click.BadParameter("the operators run on cpu and cuda.", param_hint="'--device'")
    automatic = "float32" if config.device == "cpu" else "float16"
    options: dict[str, Any] = {
        "device": config.device,
        "dtype": getattr(torch, automatic if config.dtype == "auto" else config.dtype),
        "repeats": config.repeats,
        "seed": config.seed,
    }
    if config.pattern in RUNS:
        d_model, d_ff = config.shape or SHAPES["7b"]
        if config.sparsity:
            options["sparsities"] = config.sparsity
        return OperatorBenchConfig(d_model=d_model, d_ff=d_ff, pattern=config.pattern, **options)
    if config.shape or config.sparsity:
        raise click.UsageError("Traces bring their --shape and --sparsity; leave these out.")
    d_model, traced = _traced(Path(config.pattern))
    d_ff = next(iter(traced.values())).shape[1]
    return OperatorBenchConfig(d_model=d_model, d_ff=d_ff, traced=traced, **options)


def _traced(path: Path) -> tuple[int, Mapping[str, Tensor]]:
    """Return d_model and, for every recorded layer, (tokens, d_ff) masks of active neurons."""
    import torch

    from predictor.traces.bits import unpack_active
    from predictor.traces.store import TraceStore

    store = TraceStore.open(path)
    tokens = torch.linspace(0, store.rows - 1, min(store.rows, _TRACED_TOKENS)).long()
    d_ff, layers = store.header.d_ff, store.header.layers
    masks = {f"layer {n}": unpack_active(store.layer(n).active_at(tokens), d_ff) for n in layers}
    return store.header.d_model, masks
