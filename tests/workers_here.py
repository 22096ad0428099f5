"""Stand-ins for a cluster's workers: the same work in this process, one item after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy as sent
from typing import Any

import pytest

from cluster.nodes import Worker
from cluster.watch import Watch

SPREAD = (
    "evaluation.nodes",
    "powerinfer_bridge.verify.nodes",
    "predictor.collection.nodes",
    "predictor.training.measuring",
    "predictor.training.nodes",
)


class PoolHere:
    """See `cluster.pool.Pool`."""

    def __init__(self, start: Callable[[], Any], worker: Worker, *, most: int) -> None:
        assert most > 0
        assert worker.memory > 0
        self._start = sent(start)
        self._work: Any = None

    def __enter__(self) -> PoolHere:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._work = None

    def made(
        self, items: Iterable[Any], watch: Watch, *, ordered: bool = False
    ) -> Iterator[tuple[Any, Any]]:
        if self._work is None:
            self._work = self._start()
        made = [(item, sent(self._work(sent(item), lambda units: None))) for item in items]
        yield from made if ordered else reversed(made)


class PipelineHere:
    """See `cluster.pipeline.Pipeline`."""

    unfinished: Sequence[Any] = ()

    def __init__(self, starts: Sequence[Any], worker: Worker, watch: Watch) -> None:
        self._stages = [sent(start)() for start in starts]

    def __enter__(self) -> PipelineHere:
        return self

    def __exit__(self, *error: object) -> None:
        self._stages = []

    def made(self, items: Iterable[Any]) -> Iterator[tuple[Any, list[Any]]]:
        for item in items:
            entering, parts = None, []
            for stage in self._stages:
                part, entering = sent(stage(sent(item), entering))
                parts.append(part)
            yield item, parts


def several_here(
    start: Any,
    items: Iterable[Any],
    worker: Worker,
    watch: Watch,
    *,
    most: int,
    ordered: bool = False,
) -> Iterator[tuple[Any, Any]]:
    """See `cluster.pool.several_on_nodes`."""
    with PoolHere(start, worker, most=most) as pool:
        yield from pool.made(items, watch, ordered=ordered)


@contextmanager
def cluster_here(address: str, worker: Any, **given: Any) -> Iterator[Worker]:
    """See `cluster.session.cluster_for`."""
    yield worker if isinstance(worker, Worker) else worker()


def place_workers_here(monkeypatch: pytest.MonkeyPatch, room: int = 3) -> None:
    """Let every command's workers be stand-ins, with room for so many of any size."""
    stand_ins = {
        "Pool": PoolHere,
        "Pipeline": PipelineHere,
        "several_on_nodes": several_here,
        "cluster_for": cluster_here,
        "room_for": lambda worker: room,
        "first_that_fits": lambda *workers: workers[0],
        "require_store": lambda size: None,
    }
    for module in SPREAD:
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(f"{module}.{name}", stand_in, raising=False)
