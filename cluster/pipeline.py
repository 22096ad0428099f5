"""Items that go through stages on several nodes, each of which makes its part of them.

What a stage lets go of goes from node to node through Ray's object stores, never through the
driver. A stage works at the next item while the one behind it works at the last.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

from cluster.nodes import Worker, room_for
from cluster.watch import WAITING, Watch
from cluster.worker import WATCH, Stage, StageActor, hired, result
from common.errors import ClusterError, reason

Item = TypeVar("Item")
Made = TypeVar("Made")

_DEATHS = 4
"""Times that stages may die before an item comes out."""

_LOOK = 1.0
"""Seconds between two looks at what is ready."""

_PATIENCE = 10.0
"""Seconds without room for all stages until they are too few."""

_QUIET = 15.0
"""Seconds until it is told that stages are not ready."""

_ANSWER = 10.0
"""Seconds that a stage has to say that it lives."""


class TooFewError(ClusterError):
    """A cluster has no room left for all stages."""


def in_flight(stages: int) -> int:
    """Return how many items a pipeline holds at once: one a stage, and one that waits."""
    return stages + 1


@dataclass(eq=False)
class _Flight(Generic[Item]):
    """An item on its way.

    Attributes:
        item: itself.
        made: of each stage, the call's result.
    """

    item: Item
    made: list[Any] = field(default_factory=list)


class Pipeline(Generic[Item, Made]):
    """Stages that live until the block ends."""

    def __init__(
        self, starts: Sequence[Callable[[], Stage[Item, Made]]], worker: Worker, watch: Watch
    ) -> None:
        """Name what they do.

        Args:
            starts: makes the work of each stage, in order.
            worker: what each takes of a node; torch has as many threads.
            watch: is told what happens.
        """
        self._starts, self._worker, self._watch = starts, worker, watch
        self._stages: list[Any] = [None] * len(starts)
        self._nodes: dict[int, str] = {}
        self._flights: deque[_Flight[Item]] = deque()
        self._epoch = 0

    def __enter__(self) -> Pipeline[Item, Made]:
        """Give it out."""
        return self

    def __exit__(self, *error: object) -> None:
        """End all stages."""
        import ray

        for stage in self._stages:
            if stage is not None:
                ray.kill(stage)

    def made(self, items: Iterable[Item]) -> Iterator[tuple[Item, list[Made]]]:
        """Yield every item in order, with what each stage made of it.

        What a stage raises comes out. If one dies, everything that is on its way begins again.

        Raises:
            TooFewError: there is no room for all of them.
            ClusterError: stages died again and again.
        """
        from ray.exceptions import RayError, RayTaskError

        waiting, flights, deaths = iter(items), self._flights, 0
        while True:
            try:
                self._fill()
                for item in islice(waiting, in_flight(len(self._stages)) - len(flights)):
                    flights.append(_Flight(item))
                for flight in flights:
                    if not flight.made:
                        self._send(flight)
                if not flights:
                    return
                made = self._arrived(flights[0])
            except RayTaskError:
                raise
            except RayError as error:
                deaths += 1
                if deaths >= _DEATHS:
                    raise ClusterError(
                        f"stages died {deaths} times ({reason(error)})",
                        "look at the nodes' memory, then go on with --resume",
                    ) from error
                self._mend()
                for flight in flights:
                    flight.made.clear()
                continue
            yield flights.popleft().item, made
            deaths = 0

    @property
    def unfinished(self) -> list[Item]:
        """Items that were taken and did not come out, in order."""
        return [flight.item for flight in self._flights]

    def _fill(self) -> None:
        """Hire the stages that are missing, and wait until they are ready.

        Raises:
            RayError: one died meanwhile.
            TooFewError: there is no room for all.
        """
        import ray

        missing = [n for n, stage in enumerate(self._stages) if stage is None]
        if not missing:
            return
        self._require_room()
        for n in missing:
            self._stages[n] = hired(StageActor, self._starts[n], self._worker)
        calls = {n: self._stages[n].prepare.remote() for n in missing}
        begun, told = time.monotonic(), False
        for n, call in calls.items():
            while not ray.wait([call], timeout=_LOOK)[0]:
                if not told and time.monotonic() - begun > _QUIET:
                    told = True
                    self._watch.note(WAITING)
            node, host, _ = result(call)
            self._nodes[n] = f"{host} ({node[:6]})"

    def _require_room(self) -> None:
        begun, stages = time.monotonic(), len(self._stages)
        while (room := room_for(self._worker)) < stages:
            if time.monotonic() - begun > _PATIENCE:
                raise TooFewError(
                    f"{stages} stages are needed at once, the cluster has room for {room}",
                    "add nodes, then go on with --resume",
                )
            time.sleep(_LOOK)

    def _send(self, flight: _Flight[Item]) -> None:
        entering: Any = None
        for stage in self._stages:
            made, entering = stage.make.options(num_returns=2).remote(
                self._epoch, flight.item, entering
            )
            flight.made.append(made)

    def _arrived(self, flight: _Flight[Item]) -> list[Made]:
        """Wait for an item.

        Raises:
            RayError: a stage died.
        """
        import ray

        made = []
        for call in flight.made:
            while not ray.wait([call], timeout=_LOOK)[0]:
                self._watch.working(0, len(self._stages), len(set(self._nodes.values())))
            made.append(result(call))
        return made

    def _mend(self) -> None:
        """Find out which stages live, and let them pass over what they were to do."""
        import ray
        from ray.exceptions import RayError

        self._epoch += 1
        calls = [
            stage and stage.reset.options(concurrency_group=WATCH).remote(self._epoch)
            for stage in self._stages
        ]
        for n, call in enumerate(calls):
            try:
                if call is not None:
                    ray.get(call, timeout=_ANSWER)
            except RayError:
                ray.kill(self._stages[n])
                self._stages[n] = None
                self._watch.note(f"stage {n + 1} died on {self._nodes.get(n, 'a node')}")
