"""How long work takes on a cluster, and what keeps more workers from helping.

Bottleneck analysis (Denning and Buzen 1978): workers, the driver, and the file system work at the
same time, so that whichever of them has most to do sets the time, after a start-up. What comes from
the scheduler's own workings, such as stragglers, is not in it: `cost_model.scheduling` has that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cost_model.cluster import Cluster

START, DRIVER, STORAGE = "start-up", "the driver", "the file system"


@dataclass(frozen=True, kw_only=True)
class Work:
    """Items that workers do; all are alike.

    Attributes:
        name: of all items, such as `layers`.
        items: their number.
        rounds: how often all of them are done; a round begins when the one before has ended.
        parts: seconds of an item on its worker, or on each of its workers in turn, by part.
        overlapped: whether the parts go on at once.
        stages: workers that an item goes through, one after the other.
        driver: seconds that the driver takes for an item, one item after the other.
        start: seconds until a worker is ready, less loading.
        loaded: bytes that those workers read together before their first item; workers of one node
            read the same ones once.
        read: bytes of an item that come from the shared file system.
        written: bytes of an item that go there.
        crossed: bytes of an item that go from worker to worker.
    """

    name: str
    items: int
    rounds: float = 1.0
    parts: dict[str, float]
    overlapped: bool = False
    stages: int = 1
    driver: float = 0.0
    start: float = 0.0
    loaded: float = 0.0
    read: float = 0.0
    written: float = 0.0
    crossed: float = 0.0

    @property
    def item_seconds(self) -> float:
        """What an item takes of its worker, or of each of its workers."""
        return max(self.parts.values()) if self.overlapped else sum(self.parts.values())

    @property
    def slowest_part(self) -> str:
        """The part that an item takes longest for."""
        return max(self.parts, key=lambda part: self.parts[part])

    def at_once(self, cluster: Cluster) -> int:
        """Return how many items are done at once, or could be."""
        return cluster.workers // self.stages

    def storage_seconds(self, cluster: Cluster) -> float:
        """Return what an item takes of the shared file system."""
        return max(self.written / cluster.write, self.read / cluster.read)

    def node_loads(self, cluster: Cluster) -> float:
        """Return the bytes that a node reads before its workers' first items."""
        return self.loaded * min(1.0, cluster.workers_per_node / self.stages)

    def network_bytes(self, cluster: Cluster) -> float:
        """Return all bytes that cross the network."""
        item = self.read + self.written + self.crossed
        return cluster.nodes * self.node_loads(cluster) + self.rounds * self.items * item


@dataclass(frozen=True, kw_only=True)
class Time:
    """What work takes.

    Attributes:
        seconds: from start to end.
        limit: what sets them.
    """

    seconds: float
    limit: str


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Where more workers stop helping.

    Attributes:
        work: the items' name.
        cause: what they wait for from there on.
        workers: their number; more of them gain nothing, or, with `START`, save less than they take
            to start.
    """

    work: str
    cause: str
    workers: int


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A job on a number of nodes.

    Attributes:
        nodes: their number.
        workers: on all of them.
        seconds: that it takes; None where the model does not fit into so few, as the next two.
        speedup: over the fewest nodes that do.
        efficiency: of that, relative to the nodes that were added.
        limit: what sets the time.
    """

    nodes: int
    workers: int
    seconds: float | None
    speedup: float | None
    efficiency: float | None
    limit: str


def start_up(work: Work, cluster: Cluster) -> float:
    """Return the seconds until workers are ready, with what they load."""
    node = work.node_loads(cluster)
    return work.start + max(cluster.nodes * node / cluster.read, node / cluster.network)


def time_of(work: Work, cluster: Cluster) -> Time | None:
    """Return what a cluster takes for work, None if its workers are too few for an item."""
    at_once = work.at_once(cluster)
    if at_once < 1:
        return None
    turns = math.ceil(work.items / at_once) + work.stages - 1
    limits = {
        work.slowest_part: turns * work.item_seconds,
        DRIVER: work.items * work.driver,
        STORAGE: work.items * work.storage_seconds(cluster),
    }
    limit = max(limits, key=lambda name: limits[name])
    busy, start = work.rounds * limits[limit], start_up(work, cluster)
    if start > busy:
        limit = START
    elif limit == work.slowest_part and at_once >= work.items:
        limit = f"{work.items} {work.name}"
    return Time(seconds=start + busy, limit=limit)


def stops(work: Work, cluster: Cluster) -> list[Stop]:
    """Return where more workers stop helping, the earliest first."""
    whole, one = work.stages * work.item_seconds, cluster.of(1)
    found = {
        f"{work.items} {work.name}": float(work.items * work.stages),
        DRIVER: _ratio(whole, work.driver),
        STORAGE: _ratio(whole, work.storage_seconds(cluster)),
        START: _ratio(work.rounds * work.items * whole, start_up(work, one)),
    }
    ordered = sorted(found.items(), key=lambda each: each[1])
    return [
        Stop(work=work.name, cause=cause, workers=max(1, math.floor(workers)))
        for cause, workers in ordered
        if math.isfinite(workers)
    ]


def _ratio(whole: float, part: float) -> float:
    return whole / part if part else math.inf


def scaling(
    works: Sequence[Work], cluster: Cluster, nodes: Iterable[int], driver: float = 0.0
) -> list[Scaling]:
    """Return what works, one after the other, take on numbers of nodes.

    Args:
        works: at least one.
        cluster: what its nodes are like.
        nodes: numbers of them.
        driver: seconds that the driver takes beside all items.
    """
    found: list[Scaling] = []
    first: Scaling | None = None
    for number in sorted(set(nodes)):
        sized = cluster.of(number)
        times = [time_of(work, sized) for work in works]
        made = [time for time in times if time is not None]
        if len(made) < len(times):
            found.append(
                Scaling(
                    nodes=number,
                    workers=sized.workers,
                    seconds=None,
                    speedup=None,
                    efficiency=None,
                    limit="memory",
                )
            )
            continue
        seconds = driver + sum(time.seconds for time in made)
        longest = max(made, key=lambda time: time.seconds)
        speedup = first.seconds / seconds if first and first.seconds else 1.0
        found.append(
            Scaling(
                nodes=number,
                workers=sized.workers,
                seconds=seconds,
                speedup=speedup,
                efficiency=speedup * (first.nodes if first else number) / number,
                limit=DRIVER if driver > seconds / 2 else longest.limit,
            )
        )
        first = first or found[-1]
    return found
