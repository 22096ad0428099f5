"""`psp bench-operators`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.options import (
    Fraction,
    choice_option,
    count_option,
    json_option,
    seed_option,
    threads_option,
)
from commands.printing import echo, print_json

if TYPE_CHECKING:
    from torch import Tensor

    from sparse_operators.benchmark import OperatorBenchConfig

    _ShapeType = click.ParamType[tuple[int, int]]
    _SharesType = click.ParamType[tuple[float, ...]]
else:
    _ShapeType = _SharesType = click.ParamType  # not generic before click 8.4

_TRACED_TOKENS = 1024
"""Tokens of a layer to draw masks from, spread over the traces."""


class Shape(_ShapeType):
    """`7b`, `13b`, or D,F."""

    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return (d_model, d_ff)."""
        from sparse_operators.benchmark import SHAPES

        if not isinstance(value, str):
            return value
        if value in SHAPES:
            return SHAPES[value]
        if not re.fullmatch(r"0*[1-9]\d{0,6},0*[1-9]\d{0,6}", value, re.ASCII):
            problem = f"{value!r} is no shape; write 7b, 13b, or sizes such as 4096,11008."
            self.fail(problem, param, ctx)
        d_model, d_ff = value.split(",")
        return int(d_model), int(d_ff)


class Shares(_SharesType):
    """Numbers from 0 to 1, also in per cent, such as `0,0.5,88%`."""

    name = "shares"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the numbers."""
        if not isinstance(value, str):
            return value
        one = Fraction(0, 1)
        return tuple(one.convert(part.strip(), param, ctx) for part in value.split(","))


@click.command("bench-operators", short_help="Measure the sparse FFN operators.")
@click.option(
    "--shape", type=Shape(), metavar="7b|13b|D,F", help="Hidden size and neurons.  [default: 7b]"
)
@click.option(
    "--sparsity",
    type=Shares(),
    metavar="S,S,...",
    help="Shares of inactive neurons.  [default: 0,0.5,0.67,0.88,0.95]",
)
@click.option(
    "--pattern",
    default="random",
    show_default=True,
    metavar="random|clustered|TRACES",
    help="How active neurons lie; TRACES: as in real tokens, from psp collect.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu or a CUDA device.")
@choice_option(
    "--dtype",
    ["auto", "float16", "bfloat16", "float32"],
    "Of weights and inputs; auto: float32 on the CPU, else float16.",
)
@count_option(
    "--repeats", default=25, least=1, help_text="Timed turns, of which the median counts."
)
@seed_option
@threads_option
@json_option
def bench_operators(as_json: bool, threads: int, **options: Any) -> None:
    """Measure S2, S3 and the FFN made of them against dense products, one token at a time.

    Dense and sparse run by turns on weights that no cache holds.
    """
    from sparse_operators.benchmark import bench_operators as run
    from sparse_operators.benchmark_table import operator_table

    document = run(_config(**options))
    if as_json:
        return print_json(document)
    echo(operator_table(document))


def _config(
    *, shape: tuple[int, int] | None, sparsity: tuple[float, ...] | None, **options: Any
) -> OperatorBenchConfig:
    import torch

    from architectures.model import check_device
    from sparse_operators.benchmark import SHAPES, OperatorBenchConfig
    from sparse_operators.patterns import RUNS

    device, pattern, dtype = options.pop("device"), options.pop("pattern"), options.pop("dtype")
    check_device(device)
    if torch.device(device).type not in ("cpu", "cuda"):
        raise click.BadParameter("the operators run on cpu and cuda.", param_hint="'--device'")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "float16"
    options |= {"device": device, "dtype": getattr(torch, dtype)}
    if pattern in RUNS:
        d_model, d_ff = shape or SHAPES["7b"]
        options |= {"pattern": pattern} | ({"sparsities": sparsity} if sparsity else {})
        return OperatorBenchConfig(d_model=d_model, d_ff=d_ff, **options)
    if shape or sparsity:
        raise click.UsageError("Traces bring their --shape and --sparsity; leave these out.")
    d_model, traced = _traced(Path(pattern))
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
