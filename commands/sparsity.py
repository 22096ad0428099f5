"""`psp sparsity`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.options import (
    PATH,
    Fraction,
    count_option,
    data_option,
    force_option,
    json_option,
    model_option,
    threads_option,
)
from commands.printing import echo, note, print_json

if TYPE_CHECKING:
    _ThresholdsType = click.ParamType[tuple[float, ...]]
else:
    _ThresholdsType = click.ParamType  # not generic before click 8.4


class Thresholds(_ThresholdsType):
    """Numbers such as `0,0.01,0.1`."""

    name = "thresholds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the numbers."""
        if not isinstance(value, str):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers; write 0,0.01,0.1.", param, ctx)


@click.command(short_help="Measure sparsity, and search FATReLU's threshold.")
@model_option
@data_option(required=True, help_text="Held-out text to run the model on.")
@count_option("--tokens", default=16384, least=64, help_text="Tokens to run, at most.")
@count_option("--context", default=512, least=2, help_text="Longest window, tokens.")
@click.option(
    "--thresholds",
    type=Thresholds(),
    default=(),
    metavar="T,T,...",
    help="Also measure FATReLU with each of these thresholds; 0 is ReLU.",
)
@click.option(
    "--max-ppl-gap",
    type=Fraction(0, min_open=True),
    help="Search the threshold with most sparsity that lets perplexity grow by no more than this "
    "over ReLU, such as 1%.",
)
@click.option("--per-layer", is_flag=True, help="Search a threshold for each layer.")
@click.option(
    "--out", type=PATH, metavar="DIR", help="Write the model with the threshold that was found."
)
@click.option("--device", default="cpu", show_default=True, help="Torch device of the model.")
@threads_option
@force_option
@json_option
def sparsity(
    as_json: bool,
    threads: int,
    max_ppl_gap: float | None,
    per_layer: bool,
    out: Path | None,
    force: bool,
    **options: Any,
) -> None:
    """Measure sparsity and perplexity with ReLU and FATReLU; search a threshold on request."""
    from prosparse.sparsity import SparsityConfig
    from prosparse.sparsity import sparsity as measure
    from prosparse.sparsity_table import sparsity_table
    from prosparse.threshold_shift import ShiftConfig, shift

    if max_ppl_gap is None:
        if per_layer or out is not None:
            raise click.UsageError("--per-layer and --out need --max-ppl-gap, the bound to search.")
        document = measure(SparsityConfig(**options), note)
    else:
        options |= {"max_ppl_gap": max_ppl_gap, "per_layer": per_layer}
        document = shift(ShiftConfig(out=out, force=force, **options), note)
    if as_json:
        return print_json(document)
    echo(sparsity_table(document))
