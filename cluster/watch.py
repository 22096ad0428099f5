"""What is told of work on a cluster: one bar, what went wrong, and with `--verbose` every item."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from cluster.spans import Span

WAITING = "waiting for workers: the cluster is busy, or what they load is large"


_LISTENERS: list[Callable[[Span], None]] = []


@contextmanager
def spans_heard(listener: Callable[[Span], None]) -> Iterator[None]:
    """Let the times of every item that is made in the block be taken."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


class Watch:
    """Tells of work.

    Attributes:
        note: takes a line that everybody should read.
        named: names an item.
    """

    def __init__(
        self,
        bar: tqdm,
        note: Callable[[str], None],
        *,
        what: str,
        named: Callable[[Any], str],
        verbose: bool = False,
        each: bool = True,
    ) -> None:
        """Name where it is told.

        Args:
            bar: counts units; what is committed is counted by who commits it.
            note: see the class.
            what: what items are called, such as `shards`.
            named: names an item, such as `shard 3`.
            verbose: tell of every item too, and of every node at the end.
            each: items are large enough to be told of one by one.
        """
        self._bar, self.note, self._what, self._verbose = bar, note, what, verbose
        self._each = verbose and each
        self.named, self._ahead = named, 0
        self._made: dict[str, int] = defaultdict(int)
        self._spent: dict[str, float] = defaultdict(float)

    def working(self, units: int, workers: int, nodes: int) -> None:
        """Show work in progress.

        Args:
            units: of items that are not committed.
            workers: that are ready.
            nodes: that they are on.
        """
        self._bar.n += units - self._ahead
        self._ahead = units
        self._bar.set_postfix({"nodes": nodes, "workers": workers}, refresh=False)
        self._bar.refresh()

    def twice(self, item: Any, node: str) -> None:
        """Tell that an item that takes long is made a second time."""
        if self._each:
            self.note(f"{self.named(item)} takes long and is made on {node} too")

    def made(self, item: Any, span: Span) -> None:
        """Take the times of an item."""
        for listener in _LISTENERS:
            listener(span)
        self._made[span.node] += 1
        self._spent[span.node] += span.ended - span.begun
        if self._each:
            took = span.ended - span.begun
            self.note(f"{self.named(item)}: {took:.1f} s on {span.node}")

    def finished(self) -> None:
        """Tell what each node made."""
        if self._verbose:
            for node, count in sorted(self._made.items()):
                spent = self._spent[node]
                self.note(f"{node}: {count} {self._what} in {spent:.1f} s of its workers")
