"""Workers on nodes, actors of Ray's that hold what items need and make one item after the other."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from cluster.nodes import Worker
from common.errors import PspError

Item = TypeVar("Item")
Made = TypeVar("Made")

Tell = Callable[[int], None]
"""Takes units of an item that are done, such as tokens or steps, as they are done."""

Work = Callable[[Item, Tell], Made]
Start = Callable[[], Work[Item, Made]]
"""Makes a worker's work: loads a model, opens traces."""

Stage = Callable[[Item, Any], tuple[Made, Any]]
"""Makes a stage's part of an item of what the stage before let go of, None for the first; returns
it, and what the next stage takes."""

WATCH = "watch"
"""The group of calls that are answered while an item is made."""


class _Actor:
    def __init__(self, start: Callable[[], Any], threads: int) -> None:
        """Name what it does; nothing that may fail is done here, where Ray would wrap the error.

        Args:
            start: see `Start`; of a stage, what makes a `Stage`.
            threads: of torch.
        """
        self._start, self._threads = start, threads
        self._work: Any = None

    def prepare(self) -> tuple[str, str, int]:
        """Get ready for items.

        Returns:
            The node's id and host name, and the process.
        """
        import ray

        # Ray has told OpenMP so, before torch was imported; what starts may think otherwise.
        self._work = self._start()
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(self._threads)
        node = ray.get_runtime_context().get_node_id()
        return node, os.uname().nodename, os.getpid()


class WorkerActor(_Actor, Generic[Item, Made]):
    """Makes whole items."""

    _units = 0

    def make(self, item: Item) -> tuple[Made, float, float]:
        """Make an item.

        Returns:
            What was made; seconds of this node's clock at begin and end.
        """
        self._units = 0
        begun = time.time()
        made = self._work(item, self._tell)
        return made, begun, time.time()

    def _tell(self, units: int) -> None:
        self._units += units

    def units(self) -> int:
        """Return the units of the item at hand that are done; see `WATCH`."""
        return self._units


class StageActor(_Actor, Generic[Item, Made]):
    """Makes its part of every item."""

    _epoch = 0

    def reset(self, epoch: int) -> None:
        """Pass over calls of earlier epochs, which wait here; see `WATCH`."""
        self._epoch = epoch

    def make(self, epoch: int, item: Item, entering: Any) -> tuple[Made | None, Any]:
        """Make this stage's part of an item; nothing if the call is of an earlier epoch."""
        if epoch < self._epoch:
            return None, None
        made: tuple[Made, Any] = self._work(item, entering)
        return made


def hired(kind: type[_Actor], start: Callable[[], Any], worker: Worker) -> Any:
    """Return Ray's handle of an actor, which starts once a node has room for it.

    Args:
        kind: of the actor.
        start: see `Start`; of a stage, what makes a `Stage`.
        worker: what it takes of a node.
    """
    import ray

    actor: Any = ray.remote(
        num_cpus=worker.cpus,
        num_gpus=worker.gpus,
        memory=worker.memory,
        max_restarts=0,
        max_task_retries=0,
        concurrency_groups={WATCH: 1},
        scheduling_strategy="SPREAD",
    )
    return actor(kind).remote(start, worker.cpus)


def result(call: Any) -> Any:
    """Return what a call of an actor gave, or raise what it raised.

    Raises:
        RayError: the actor, or something that it was to take, is gone.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(call)
    except RayTaskError as error:
        if isinstance(error.cause, PspError | OSError):
            raise error.cause from None
        if isinstance(error.cause, RayError):
            raise error.cause from None
        raise
