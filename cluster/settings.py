"""Settings of work on a Ray cluster, for the settings of the commands that can."""

from __future__ import annotations

from typing import Annotated

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
RayCpus = Annotated[int, Option("With --ray: CPUs, and threads, of a task.", least=1)]
RayGpus = Annotated[float, Option("With --ray: GPUs of a task; 0 computes on CPUs.", least=0)]
