"""`cluster.json` of `psp estimate --cluster`: what collecting and training would take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.typed_json import Count
from cost_model.cluster import Cluster
from cost_model.cluster_plan import Scaling, Stop
from results.parts import Amount, ResultFile


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """A command on the cluster.

    Attributes:
        seconds: that it takes on the cluster; None where the model does not fit into it.
        limit: what sets them.
        disk_bytes: that it leaves on the shared file system.
        network_bytes: that nodes send and receive, the file system's among them.
        items: what workers do, by name.
        stages: workers that hold the model together.
        item_seconds: seconds of an item on its workers, by name and part.
        scaling: by nodes.
        stops: where more workers stop helping, the earliest first.
    """

    seconds: Amount | None
    limit: str
    disk_bytes: Amount
    network_bytes: Amount
    items: dict[str, Count]
    stages: Count
    item_seconds: dict[str, dict[str, Amount]]
    scaling: tuple[Scaling, ...]
    stops: tuple[Stop, ...]


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """A plan; nothing in it was measured on the cluster.

    Attributes:
        label: says so.
        sizes: of the model.
        tokens: that are recorded.
        jobs: by command.
        measured: figures that were measured elsewhere, a line each.
        assumptions: what was taken for granted, likewise.
    """

    kind: Literal["psp.cluster"] = "psp.cluster"
    schema_version: Literal[1] = 1
    label: Literal["estimate"] = "estimate"
    tool_version: str
    model: str
    sizes: dict[str, Count]
    tokens: Count
    cluster: Cluster
    jobs: dict[str, JobPlan]
    measured: tuple[str, ...]
    assumptions: tuple[str, ...]


CLUSTER = ResultFile(
    name="cluster.json",
    maker="psp estimate MODEL --cluster N×HARDWARE --out DIR",
    content=ClusterPlan,
)
