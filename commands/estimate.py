"""`psp estimate`."""

from __future__ import annotations

import click

from commands.options import json_option, settings_options
from commands.printing import show
from powerinfer_bridge.estimate.settings import EstimateConfig


@click.command("estimate")
@settings_options(EstimateConfig)
@json_option
def estimate(config: EstimateConfig, as_json: bool) -> None:
    """Estimate tokens per second of a file: dense, all neurons, predicted; nothing is run.

    Bytes are summed over bandwidths, device by device, with PowerInfer's own placement under a VRAM
    budget; with a GPU a table shows which budget is the best.
    """
    from powerinfer_bridge.estimate.run import estimate as run
    from powerinfer_bridge.estimate.table import estimate_table

    show(run(config), estimate_table, as_json=as_json)
