"""Which items of some work wait, which are worked at and which are made.

It knows nothing of Ray. An item is handed out again if its worker died, and a second time to a
worker that has nothing to do if it takes much longer than the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from typing import Generic, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

_SLOW = 1.5
"""Times the median of what is made, after which an item is handed out twice (as Spark's
speculation.multiplier was until 3.5)."""

_REMEMBERED = 256
"""Items of one kind of which the median is taken, the last ones."""


@dataclass(eq=False)
class Entry(Generic[Item]):
    """An item that is not made yet.

    Attributes:
        number: its place among the items.
        item: itself.
        since: worker to when it was handed out to it, seconds of the caller's clock.
        deaths: workers that died at it.
    """

    number: int
    item: Item
    since: dict[str, float] = field(default_factory=dict)
    deaths: int = 0


class Backlog(Generic[Item, Made]):
    """The items of some work."""

    def __init__(self, items: Iterable[Item], *, ordered: bool, ahead: int) -> None:
        """Name the items; they are taken as they are needed.

        Args:
            items: what is to be made.
            ordered: give out what is made in the order of the items.
            ahead: items that may be in hand beyond the first that was not given out, if ordered.
        """
        self._items, self._ordered, self.ahead = iter(items), ordered, ahead
        self._next = deque(islice(self._items, 1))
        self._returned: deque[Entry[Item]] = deque()
        self._open: dict[int, Entry[Item]] = {}
        self._made: dict[int, tuple[Item, Made]] = {}
        self._taken = self._given = 0
        self._took: dict[type, deque[float]] = {}

    @property
    def finished(self) -> bool:
        """Whether every item was made and given out."""
        return not (self._next or self._open or self._made)

    @property
    def open(self) -> Iterator[Entry[Item]]:
        """Items that are not made, of those that were taken."""
        return iter(self._open.values())

    def next(self, worker: str, now: float) -> Entry[Item] | None:
        """Return what a worker without work is to do, None if there is nothing for it.

        Args:
            worker: its name.
            now: seconds.
        """
        entry = self._returned.popleft() if self._returned else self._new() or self._slow(now)
        if entry is not None:
            entry.since[worker] = now
        return entry

    def _new(self) -> Entry[Item] | None:
        if not self._next or (self._ordered and self._taken - self._given >= self.ahead):
            return None
        entry = self._open[self._taken] = Entry(self._taken, self._next.popleft())
        self._taken += 1
        self._next.extend(islice(self._items, 1))
        return entry

    def _slow(self, now: float) -> Entry[Item] | None:
        usual = {kind: median(took) for kind, took in self._took.items()}
        slow = [
            (since, entry)
            for entry in self._open.values()
            if len(entry.since) == 1 and type(entry.item) in usual
            for since in entry.since.values()
            if now - since > _SLOW * usual[type(entry.item)]
        ]
        return min(slow, key=lambda found: found[0], default=(0.0, None))[1]

    def lost(self, entry: Entry[Item], worker: str) -> None:
        """Take an item back from a worker that died."""
        entry.since.pop(worker)
        entry.deaths += 1
        if not entry.since and entry.number in self._open:
            self._returned.append(entry)

    def made(self, entry: Entry[Item], worker: str, made: Made, now: float) -> bool:
        """Take what a worker made; return whether it was the first that did.

        Args:
            entry: what it was given.
            worker: its name.
            made: the result.
            now: seconds.
        """
        begun = entry.since.pop(worker)
        if self._open.pop(entry.number, None) is None:
            return False
        if entry in self._returned:
            self._returned.remove(entry)
        took = self._took.setdefault(type(entry.item), deque(maxlen=_REMEMBERED))
        took.append(now - begun)
        self._made[entry.number] = entry.item, made
        return True

    def given_out(self) -> Iterator[tuple[int, Item, Made]]:
        """Yield number, item and what was made of it, of all that may be given out by now."""
        while self._made:
            number = self._given if self._ordered else next(iter(self._made))
            if number not in self._made:
                return
            item, made = self._made.pop(number)
            self._given += 1
            yield number, item, made
