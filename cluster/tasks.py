"""Work of which every item is a task on the cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from cluster.nodes import Worker, alive_nodes, require_room
from common.errors import ClusterError, PspError, reason

Item = TypeVar("Item")
Made = TypeVar("Made")

_RETRIES = 3
"""Of a task whose worker or node died; what a task itself raises ends everything."""

_LOOK = 2.0
"""Seconds between two looks at the nodes while nothing is ready."""

_PATIENCE = 60.0
"""Seconds without a node that fits until the work is given up."""


def several_on_nodes(
    work: Callable[[Item], Made], items: Iterable[Item], worker: Worker
) -> Iterator[tuple[Item, Made]]:
    """Yield every item with what is made of it, as they finish; see `several_at_once`.

    The first exception comes out and stops the rest. A task whose worker died is started again,
    maybe while the first one still runs elsewhere: what it writes must not be in its way.

    Args:
        work: what a task does; it, an item and what is made are small, for they pass through the
            driver.
        items: such as layer numbers.
        worker: what a task takes of a node; torch has as many threads.

    Raises:
        ClusterError: no node is left that fits, or a task's workers died again and again.
    """
    import ray

    task = ray.remote(_with_threads).options(
        num_cpus=worker.cpus,
        num_gpus=worker.gpus,
        memory=worker.memory,
        max_retries=_RETRIES,
        retry_exceptions=False,
    )
    waiting = {task.remote(work, item, worker.cpus): item for item in items}
    room = _Room(worker)
    try:
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=_LOOK)
            if not ready:
                room.look()
            for reference in ready:
                item = waiting.pop(reference)
                yield item, _result(reference, item)
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def _with_threads(work: Callable[[Item], Made], item: Item, threads: int) -> Made:
    import torch

    torch.set_num_threads(threads)
    return work(item)


def _result(reference: Any, item: object) -> Any:
    """Return what a task made, or raise what it raised."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, PspError):
            raise error.cause from None
        raise
    except RayError as error:
        raise ClusterError(
            f"the worker of {item} died {_RETRIES + 1} times ({reason(error)})",
            "look at its node's memory, then go on with --resume",
        ) from error


class _Room:
    """Notices that no node is left on which a task could run."""

    def __init__(self, worker: Worker) -> None:
        """Name what a task takes."""
        self._worker, self._seen = worker, time.monotonic()

    def look(self) -> None:
        """Look at the nodes.

        Raises:
            ClusterError: none has fitted for long enough.
        """
        if any(self._worker.fits(node) for node in alive_nodes()):
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > _PATIENCE:
            require_room(self._worker)
