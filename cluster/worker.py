"""A worker on a node: an actor that holds what an item needs and makes one item after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from common.errors import PspError

Item = TypeVar("Item")
Made = TypeVar("Made")

Tell = Callable[[int], None]
"""Takes units of an item that are done, such as tokens or steps, as they are done."""

Work = Callable[[Item, Tell], Made]
Start = Callable[[], Work[Item, Made]]
"""Makes a worker's work: loads a model, opens traces."""

WATCH = "watch"
"""The group of calls that are answered while an item is made."""


class WorkerActor(Generic[Item, Made]):
    """Lives in a process of its own on a node, as an actor of Ray's."""

    def __init__(self, start: Start[Item, Made], threads: int) -> None:
        """Name what it does; nothing that may fail is done here, where Ray would wrap the error.

        Args:
            start: see `Start`.
            threads: of torch.
        """
        self._start, self._threads, self._units = start, threads, 0
        self._work: Work[Item, Made] | None = None

    def prepare(self) -> tuple[str, str, int]:
        """Get ready for items.

        Returns:
            The node's id and host name, and the process.
        """
        import ray
        import torch

        torch.set_num_threads(self._threads)
        self._work = self._start()
        node = ray.get_runtime_context().get_node_id()
        return node, os.uname().nodename, os.getpid()

    def make(self, item: Item) -> tuple[Made, float, float]:
        """Make an item.

        Returns:
            What was made; seconds of this node's clock at begin and end.
        """
        assert self._work is not None
        self._units = 0
        begun = time.time()
        made = self._work(item, self._tell)
        return made, begun, time.time()

    def _tell(self, units: int) -> None:
        self._units += units

    def units(self) -> int:
        """Return the units of the item at hand that are done; see `WATCH`."""
        return self._units


def raised(error: BaseException) -> PspError | None:
    """Return the error of ours that a worker raised, if it is one."""
    cause: Any = getattr(error, "cause", None)
    return cause if isinstance(cause, PspError) else None
