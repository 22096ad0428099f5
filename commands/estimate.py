"""`psp estimate`."""

from __future__ import annotations

from typing import ClassVar

import click

from commands.options import json_option, settings_options
from commands.printing import show
from commands.variants import WithVariants
from pipeline.cluster_settings import ClusterConfig
from powerinfer_bridge.estimate.settings import EstimateConfig

CLUSTER = "--cluster"


@click.command("estimate --cluster")
@settings_options(ClusterConfig)
@json_option
def cluster(config: ClusterConfig, as_json: bool) -> None:
    """Plan psp collect and psp train-predictor on a Ray cluster; nothing is run.

    Time, disk and network of the shards and layers of a model of which config.json is enough, on 1
    to 64 nodes, and what keeps more of them from helping.
    """
    from pipeline.cluster_plan import plan_cluster
    from pipeline.cluster_table import cluster_table

    show(plan_cluster(config), cluster_table, as_json=as_json)


class _WithCluster(WithVariants):
    variants: ClassVar[dict[str, click.Command]] = {CLUSTER: cluster}


@click.command("estimate", cls=_WithCluster)
@settings_options(EstimateConfig)
@click.option(
    CLUSTER,
    metavar="N×NAME|FILE.yaml",
    expose_value=False,
    help="Plan collecting and training on a cluster instead, of a model that need not be at hand; "
    "it has options of its own: --cluster --help.",
)
@json_option
def estimate(config: EstimateConfig, as_json: bool) -> None:
    """Estimate tokens per second of a file: dense, all neurons, predicted; nothing is run.

    Bytes are summed over bandwidths, device by device, with PowerInfer's own placement under a VRAM
    budget; with a GPU a table shows which budget is the best.
    """
    from powerinfer_bridge.estimate.run import estimate as run
    from powerinfer_bridge.estimate.table import estimate_table

    show(run(config), estimate_table, as_json=as_json)
