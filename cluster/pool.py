"""Workers on a cluster's nodes that share out the items of some work."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from cluster.backlog import Backlog, Entry
from cluster.nodes import Worker, require_room, room_for
from cluster.spans import Span
from cluster.watch import WAITING, Watch
from cluster.worker import WATCH, Start, WorkerActor, hired, result
from common.errors import ClusterError, PspError, reason

Item = TypeVar("Item")
Made = TypeVar("Made")

_DEATHS = 4
"""Workers that may die at one item, or one after the other before they are ready."""

_LOOK = 1.0
"""Seconds between two looks at nodes and workers."""

_PATIENCE = 60.0
"""Seconds without a node that fits until the work is given up."""

_QUIET = 15.0
"""Seconds without a ready worker until that is told."""

_AHEAD = 3
"""Items a worker that may be in hand, where they are given out in order."""


@dataclass(eq=False)
class _Hand(Generic[Item]):
    """A worker as the driver sees it.

    Attributes:
        name: of its own.
        actor: Ray's handle.
        call: the call that it is at: to get ready or to make an item.
        node: where it is, once it is ready.
        entry: the item that it is at.
        of: what that is an item of: the work before, if a copy of it was not waited for.
        asked: a question how far it is, that it has not answered.
        units: what it answered last.
        ready: whether it can take items.
    """

    name: str
    actor: Any
    call: Any
    node: str = ""
    entry: Entry[Item] | None = None
    of: object = None
    asked: Any = None
    units: int = 0
    ready: bool = False


class Pool(Generic[Item, Made]):
    """Workers that are hired as there is room for them, until the block ends."""

    def __init__(self, start: Start[Item, Made], worker: Worker, *, most: int) -> None:
        """Name what they do; see `several_on_nodes`."""
        self._start, self._worker, self._most = start, worker, most
        self._watch = Watch(tqdm(disable=True), lambda line: None, what="", named=str)
        self._backlog: Backlog[Item, Made] = Backlog((), ordered=False, ahead=0)
        self._hands: list[_Hand[Item]] = []
        self._spans: dict[int, Span] = {}
        self._count = self._failed = 0
        self._looked = 0.0
        self._fitted = self._answered = time.monotonic()

    def __enter__(self) -> Pool[Item, Made]:
        """Give it out."""
        return self

    def __exit__(self, *error: object) -> None:
        """End all workers."""
        self.close()

    def close(self) -> None:
        """End all workers, for their room; later items have new ones."""
        import ray

        for hand in self._hands:
            ray.kill(hand.actor)
        self._hands.clear()

    def made(
        self, items: Iterable[Item], watch: Watch, *, ordered: bool = False
    ) -> Iterator[tuple[Item, Made]]:
        """Yield every item with what is made of it; see `several_on_nodes`.

        It may be called again once all was yielded.
        """
        self._watch = watch
        self._backlog = Backlog(items, ordered=ordered, ahead=_AHEAD)
        self._fitted = self._answered = time.monotonic()
        self._looked = 0.0
        while not self._backlog.finished:
            self._look()
            self._hand_out()
            for number, item, made in self._backlog.given_out():
                yield item, made
                now = time.time()
                self._watch.made(item, replace(self._spans.pop(number), committed=now))
            self._hand_out()
            self._wait()
        self._watch.finished()

    def _look(self) -> None:
        """Look at nodes and workers from time to time."""
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return
        self._looked = now
        room = room_for(self._worker)
        if room:
            self._fitted = now
        elif now - self._fitted > _PATIENCE:
            require_room(self._worker)
        while len(self._hands) < min(room, self._most):
            self._hands.append(self._hired())
        self._backlog.ahead = _AHEAD * max(1, len(self._hands))
        ready = [hand for hand in self._hands if hand.ready]
        if ready:
            self._answered = now
        elif now - self._answered > _QUIET:
            self._answered = float("inf")
            self._watch.note(WAITING)
        for hand in ready:
            if hand.entry is not None and hand.asked is None:
                hand.asked = hand.actor.units.options(concurrency_group=WATCH).remote()
        self._show()

    def _show(self) -> None:
        ready = [hand for hand in self._hands if hand.ready]
        units: dict[int, int] = {}
        for hand in ready:
            if hand.entry is not None and hand.of is self._backlog:
                number = hand.entry.number
                units[number] = max(units.get(number, 0), hand.units)
        self._watch.working(sum(units.values()), len(ready), len({hand.node for hand in ready}))

    def _hired(self) -> _Hand[Item]:
        actor = hired(WorkerActor, self._start, self._worker)
        self._count += 1
        return _Hand(f"worker {self._count}", actor, actor.prepare.remote())

    def _hand_out(self) -> None:
        """Give work to whoever has none."""
        for hand in self._hands:
            if not hand.ready or hand.entry is not None:
                continue
            entry = self._backlog.next(hand.name, time.time())
            if entry is None:
                return
            if len(entry.since) > 1:
                self._watch.twice(entry.item, hand.node)
            hand.entry, hand.of, hand.units = entry, self._backlog, 0
            hand.call = hand.actor.make.remote(entry.item)

    def _wait(self) -> None:
        """Wait until a worker has something, or until the next look."""
        import ray

        if self._backlog.finished:
            return
        calls = {hand.call: hand for hand in self._hands if not hand.ready or hand.entry}
        asked = {hand.asked: hand for hand in self._hands if hand.asked is not None}
        both = [*calls, *asked]
        if not both:
            time.sleep(_LOOK)
            return
        ray.wait(both, timeout=_LOOK)
        ready, _ = ray.wait(both, num_returns=len(both), timeout=0)
        for reference in ready:
            if reference in calls:
                self._finished(calls[reference])
            elif asked[reference] in self._hands:
                self._told(asked[reference])

    def _told(self, hand: _Hand[Item]) -> None:
        """Take the answer how far a worker is; a death shows in its other call."""
        import ray
        from ray.exceptions import RayError

        with suppress(RayError):
            hand.units = ray.get(hand.asked)
        hand.asked = None

    def _finished(self, hand: _Hand[Item]) -> None:
        """Take what a worker's call gave."""
        from ray.exceptions import RayError, RayTaskError

        entry, stale = hand.entry, hand.entry is not None and hand.of is not self._backlog
        try:
            found = result(hand.call)
        except (RayTaskError, PspError, OSError):
            if not stale:
                raise
        except RayError as error:
            self._died(hand, error)
            return
        if stale:
            hand.entry = None
            return
        if entry is None:
            node, host, process = found
            hand.node, hand.ready, self._failed = f"{host} ({node[:6]})", True, 0
            hand.name = f"{hand.node} {process}"
            return
        made, begun, ended = found
        sent, now = entry.since[hand.name], time.time()
        hand.entry = None
        if self._backlog.made(entry, hand.name, made, now):
            self._spans[entry.number] = Span(
                item=entry.number,
                worker=hand.name,
                node=hand.node,
                sent=sent,
                begun=begun,
                ended=ended,
                received=now,
                committed=now,
            )

    def _died(self, hand: _Hand[Item], error: Exception) -> None:
        """Give up a worker, and hand out again what it was at."""
        import ray

        self._hands.remove(hand)
        ray.kill(hand.actor)
        entry, self._looked = hand.entry, 0.0
        if entry is not None and hand.of is not self._backlog:
            return
        if entry is None:
            self._failed += 1
            deaths, at = self._failed, "before they were ready"
            self._watch.note("a worker died before it was ready")
        else:
            self._backlog.lost(entry, hand.name)
            deaths, at = entry.deaths, f"at {self._watch.named(entry.item)}"
            self._watch.note(f"a worker on {hand.node} died {at}")
        if deaths >= _DEATHS:
            raise ClusterError(
                f"{deaths} workers died {at} ({reason(error)})",
                "look at the nodes' memory, then go on with --resume",
            ) from error


def several_on_nodes(
    start: Start[Item, Made],
    items: Iterable[Item],
    worker: Worker,
    watch: Watch,
    *,
    most: int,
    ordered: bool = False,
) -> Iterator[tuple[Item, Made]]:
    """Yield every item with what is made of it, as they finish.

    What a worker raises comes out and stops the rest. An item whose worker died is handed out
    again, one that takes much longer than the others to two workers: what it writes must not be in
    its own way.

    Args:
        start: makes the work of a worker; it, items and what is made are small, for they pass
            through the driver.
        items: such as layer numbers; taken as they are needed.
        worker: what a worker takes of a node; torch has as many threads.
        watch: is told what happens.
        most: workers that there is work for.
        ordered: give them out in their order.

    Raises:
        ClusterError: no node is left that fits, or an item's workers died again and again.
    """
    with Pool(start, worker, most=most) as pool:
        yield from pool.made(items, watch, ordered=ordered)
