"""`psp estimate`."""

from __future__ import annotations

from typing import Any

import click

from commands.options import (
    PATH,
    Fraction,
    count_option,
    force_option,
    json_option,
    threads_option,
)
from commands.printing import echo, print_json


@click.command("estimate", short_help="Estimate speed on hardware from bytes and bandwidths.")
@click.argument("file", type=PATH, metavar="NAME.powerinfer.gguf")
@click.option(
    "--hardware",
    required=True,
    metavar="NAME|this|FILE.yaml",
    help="A preset (docs/estimate.md lists them), this machine's memory measured now, or a "
    "description of one's own.",
)
@click.option(
    "--density", type=Fraction(0, 1), help="Share of neurons that the predictors let through."
)
@click.option(
    "--precision",
    type=Fraction(0, 1),
    help="With --density: share of those that are active.  [default: 1, assumed]",
)
@click.option(
    "--active",
    type=Fraction(0, 1),
    help="With --density: share of all neurons that are active.  [default: density · precision, "
    "assumed]",
)
@click.option(
    "--bench",
    type=PATH,
    metavar="DIR|bench.json",
    help="Instead of --density: a benchmark's results, layer by layer.",
)
@click.option("--vram-budget", metavar="SIZE", help="VRAM.  [default: the card's less 256 MiB]")
@count_option("--ctx", "context", least=1, default=512, help_text="Tokens that the cache holds.")
@click.option(
    "--position",
    type=click.IntRange(min=0),
    help="Tokens in the cache when the token is decoded.  [default: half of --ctx]",
)
@threads_option
@click.option(
    "--calibrate",
    type=PATH,
    multiple=True,
    metavar="DIR",
    help="Fit the CPU to the runs of a bench.json or density.json; may be repeated.",
)
@click.option(
    "--save-hardware", type=PATH, metavar="FILE.yaml", help="Write the hardware, for --hardware."
)
@click.option("--out", type=PATH, metavar="DIR", help="Write estimate.json there.")
@force_option
@json_option
def estimate(as_json: bool, **options: Any) -> None:
    """Estimate tokens per second of a file: dense, all neurons, predicted; nothing is run.

    Bytes are summed over bandwidths, device by device, with PowerInfer's own placement under a VRAM
    budget; with a GPU a table shows which budget is the best.
    """
    from powerinfer_bridge.estimate.run import EstimateConfig
    from powerinfer_bridge.estimate.run import estimate as run
    from powerinfer_bridge.estimate.table import estimate_table

    document = run(EstimateConfig(**options))
    if as_json:
        return print_json(document)
    echo(estimate_table(document))
