"""A simulation of how items of work go through a cluster, event by event.

It does what `cluster.pool` does. One driver hands an item to each worker that has none, commits
what is made, one thing after the other, and sees only in between what else has arrived. What an
item waits for stands in `Constants`, and each of these can be taken away to see what the time hangs
on. Nothing is drawn by chance. All times are seconds.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

from cluster.spans import Span

TERMS = ("start-up", "dispatch", "driver", "shared bandwidth", "look-ahead", "whole items")
"""What keeps workers from dividing the time by their number."""

_PIECES = 32
"""Items for each worker where items are thought to be divisible."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What an item waits for beside its own work.

    Attributes:
        start_up: until the first worker is ready.
        late: from then until the others are.
        dispatch: from when an item is handed out until its worker begins.
        returning: from when an item is made until the driver could know.
        driver: that the driver takes to commit an item; it does nothing else meanwhile.
        shared: that an item takes of what all workers share, such as a file system's bandwidth: its
            bytes over bytes a second. It follows the item's own work; first come, first served,
            which lets through as much in all as evenly shared.
        in_order: whether items are committed in the order of their numbers, else as they are ready.
        ahead: in order, items for each worker that may be out beyond the committed ones; None: any.
        slow: a worker for which there is no new item does one that is out already, if that has
            taken more than so many times the median; the first of both counts. None: never.
        look: until a driver to whom nothing happens looks for such items again.
    """

    start_up: float = 0.0
    late: float = 0.0
    dispatch: float = 0.0
    returning: float = 0.0
    driver: float = 0.0
    shared: float = 0.0
    in_order: bool = False
    ahead: int | None = 3
    slow: float | None = 1.5
    look: float = 1.0

    def without(self, term: str) -> Constants:
        """Return them less one of `TERMS`; that items are whole is not one of theirs."""
        gone: dict[str, Constants] = {
            "start-up": replace(self, start_up=0.0, late=0.0),
            "dispatch": replace(self, dispatch=0.0, returning=0.0),
            "driver": replace(self, driver=0.0),
            "shared bandwidth": replace(self, shared=0.0),
            "look-ahead": replace(self, ahead=None),
        }
        return gone.get(term, self)


def simulate(
    durations: Sequence[float],
    workers: int,
    constants: Constants,
    slowness: Sequence[float] = (),
) -> list[Span]:
    """Return the spans of a run that is begun at 0, one an item, in the order of commits.

    Args:
        durations: of each item's own work.
        workers: their number, at least 1.
        constants: what items wait for.
        slowness: how many times as long each worker takes; missing ones take 1.

    Returns:
        Spans, whose workers and nodes are called by their numbers.
    """
    return _Run(durations, workers, constants, slowness).spans()


def makespan(spans: Sequence[Span]) -> float:
    """Return how long a run took, from the first item handed out to the last one committed."""
    if not spans:
        return 0.0
    return max(span.committed for span in spans) - min(span.sent for span in spans)


def without(
    term: str, durations: Sequence[float], workers: int, constants: Constants
) -> tuple[Sequence[float], Constants]:
    """Return items and constants as if one of `TERMS` were not.

    Without whole items each is many pieces, which cost together what the item did.
    """
    if term != "whole items":
        return durations, constants.without(term)
    pieces = math.ceil(_PIECES * workers / max(len(durations), 1))
    cut = [duration / pieces for duration in durations for _ in range(pieces)]
    names = ("dispatch", "returning", "driver", "shared")
    shares = {name: getattr(constants, name) / pieces for name in names}
    ahead = None if constants.ahead is None else constants.ahead * pieces
    return cut, replace(constants, **shares, ahead=ahead)


@dataclass(eq=False)
class _Attempt:
    """An item on a worker."""

    item: int
    worker: int
    sent: float
    begun: float
    ended: float = math.inf


@dataclass(eq=False)
class _Driver:
    """What the driver knows.

    Attributes:
        free: workers that are ready and have no item.
        out: items that are not made, by number, with the attempts at each.
        made: items to commit, with when that was known.
        arrived: what it has not looked at: attempts, and workers that are ready.
        took: how long items were out.
        next: first item that was not handed out.
        given: items that were committed or are being.
        busy: whether it commits.
        woken: whether it is about to look.
    """

    free: list[int] = field(default_factory=list)
    out: dict[int, list[_Attempt]] = field(default_factory=dict)
    made: dict[int, tuple[_Attempt, float]] = field(default_factory=dict)
    arrived: list[_Attempt | int] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    next: int = 0
    given: int = 0
    busy: bool = False
    woken: bool = False


class _Run:
    """The state of a simulated run; events are called at their times, in order."""

    def __init__(
        self,
        durations: Sequence[float],
        workers: int,
        constants: Constants,
        slowness: Sequence[float],
    ) -> None:
        """Name the run."""
        self._durations, self._workers, self._of = durations, workers, constants
        self._slowness = [*slowness, *[1.0] * (workers - len(slowness))]
        self._now = self._link = 0.0
        self._number = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._driver = _Driver()
        self._spans: list[Span] = []

    def spans(self) -> list[Span]:
        """Return what the run saw."""
        for worker in range(self._workers):
            ready = self._of.start_up + (self._of.late if worker else 0.0)
            self._at(ready, partial(self._arrive, worker))
        while self._events and len(self._spans) < len(self._durations):
            self._now, _, event = heapq.heappop(self._events)
            event()
        return self._spans

    def _at(self, moment: float, event: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (moment, self._number, event))

    def _arrive(self, what: _Attempt | int) -> None:
        """Let something reach the driver, which sees all of the same moment at once."""
        self._driver.arrived.append(what)
        self._wake()

    def _wake(self) -> None:
        if not self._driver.busy and not self._driver.woken:
            self._driver.woken = True
            self._at(self._now, self._look)

    def _look(self) -> None:
        """Let the driver take in what has arrived, hand out, and begin to commit."""
        driver = self._driver
        driver.woken = False
        for what in driver.arrived:
            self._take(what)
        driver.arrived.clear()
        self._hand_out()
        self._commit()

    def _take(self, what: _Attempt | int) -> None:
        driver = self._driver
        if isinstance(what, int):
            heapq.heappush(driver.free, what)
            return
        heapq.heappush(driver.free, what.worker)
        if driver.out.pop(what.item, None) is not None:
            driver.took.append(self._now - what.sent)
            driver.made[what.item] = what, self._now

    def _hand_out(self) -> None:
        """Give an item to each worker that has none, if there is one for it."""
        driver = self._driver
        while driver.free:
            item = self._new()
            if item is None:
                item = self._slow()
            if item is None:
                return
            self._begin(item, heapq.heappop(driver.free))

    def _new(self) -> int | None:
        driver, ahead = self._driver, self._of.ahead
        if driver.next == len(self._durations):
            return None
        most = math.inf if ahead is None else driver.given + ahead * self._workers
        if self._of.in_order and driver.next >= most:
            return None
        driver.next += 1
        return driver.next - 1

    def _slow(self) -> int | None:
        """Return the item that was handed out first of those that take too long."""
        driver, slow = self._driver, self._of.slow
        alone = [each[0] for each in driver.out.values() if len(each) == 1]
        if slow is None or not driver.took or not alone:
            return None
        first = min(alone, key=lambda attempt: attempt.sent)
        late = self._now - first.sent > slow * median(driver.took)
        return first.item if late else None

    def _begin(self, item: int, worker: int) -> None:
        attempt = _Attempt(item, worker, self._now, self._now + self._of.dispatch)
        self._driver.out.setdefault(item, []).append(attempt)
        worked = self._durations[item] * self._slowness[worker]
        self._at(attempt.begun + worked, partial(self._worked, attempt))

    def _worked(self, attempt: _Attempt) -> None:
        """Let an item's own work be done, and queue for what is shared."""
        self._link = max(self._now, self._link) + self._of.shared if self._of.shared else self._now
        attempt.ended = self._link
        self._at(self._link + self._of.returning, partial(self._arrive, attempt))

    def _commit(self) -> None:
        """Commit the next item that may be; without one hand out again, and wait."""
        driver = self._driver
        item = driver.given if self._of.in_order else next(iter(driver.made), -1)
        driver.busy = item in driver.made
        if driver.busy:
            driver.given += 1
            attempt, received = driver.made.pop(item)
            done = partial(self._committed, attempt, received)
            self._at(self._now + self._of.driver, done)
            return
        self._hand_out()
        if driver.arrived:
            self._wake()
        elif driver.free and driver.out and self._of.slow is not None:
            self._at(self._now + self._of.look, self._wake)

    def _committed(self, attempt: _Attempt, received: float) -> None:
        worker = str(attempt.worker)
        self._spans.append(
            Span(
                item=attempt.item,
                worker=worker,
                node=worker,
                sent=attempt.sent,
                begun=attempt.begun,
                ended=attempt.ended,
                received=received,
                committed=self._now,
            )
        )
        self._commit()
