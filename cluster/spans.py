"""When what was done on a cluster was done: what is measured of its scheduling."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Span:
    """An item's way through the cluster; seconds of the clocks of where it was.

    Attributes:
        item: its place among the items.
        worker: which one made it.
        node: the worker's.
        sent: when the driver handed it out.
        begun: when the worker began.
        ended: when the worker had made it.
        received: when the driver knew.
        committed: when the driver was done with it.
    """

    item: int
    worker: str
    node: str
    sent: float
    begun: float
    ended: float
    received: float
    committed: float
