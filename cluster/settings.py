"""Settings of work on a Ray cluster, for the settings of the commands that can."""

from __future__ import annotations

from typing import Annotated

from common.errors import ClusterError
from common.settings import Option

LOCAL, AUTO = "local", "auto"

RayAddress = Annotated[
    str | None,
    Option(
        "Spread the work over a Ray cluster (docs/cluster.md): HOST:PORT; auto: the one of this "
        "machine; local: one that is started for this command.",
        "ADDRESS|auto|local",
        unset="this process alone",
    ),
]
RayCpus = Annotated[int, Option("With --ray: CPUs, and threads, of a worker.", least=1)]
RayGpus = Annotated[float, Option("With --ray: GPUs of a worker; 0 computes on CPUs.", least=0)]
Verbose = Annotated[bool, Option("With --ray: tell of every item of work and of every node.")]


def worker_device(device: str, gpus: float) -> str:
    """Return the torch device that workers compute on.

    Args:
        device: what was asked for.
        gpus: of a worker.

    Raises:
        ClusterError: workers have none of that kind.
    """
    if gpus:
        return "cuda" if device == "auto" else device
    if device not in ("auto", "cpu"):
        raise ClusterError(
            f"--device {device}: workers on the cluster have no GPU", "pass --ray-gpus 1"
        )
    return "cpu"
