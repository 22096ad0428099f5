"""How recorded rows come into a store: as they are recorded, or by threads while recording goes on.

A shard is committed once all of its rows are written, the shards in their order; by threads, while
the next one is written already: a second look at all bytes, for the checksum, takes as long as
writing them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from queue import Full, Queue
from typing import Protocol

from common.overlap import Lanes, StoppedError
from predictor.collection.recorder import Sink
from predictor.collection.row_maker import Arriving
from predictor.traces.shard_file import ShardWriter

_WAITING = 16
"""Layers of a batch that may wait for a shard, and as many for a thread; 4096 tokens of a layer of
LLaMA-7B's are 40 MB."""

_LANES = 8
"""Threads that write, each its own layers; one copies about 2 GB/s into the system's memory."""

SHARDS = 2
"""Shards that are written at the same time."""

_PATIENCE = 0.2
"""Seconds after which who waits for a thread looks whether it is still there."""

Segments = Sequence[tuple[int, int]]
_Item = tuple[int, Arriving] | BaseException | None


class Sharded(Protocol):
    """What takes shards: a store, or what stands for it in another process."""

    @property
    def layers(self) -> Sequence[int]:
        """Those that are recorded."""

    @property
    def next_shard(self) -> int:
        """Number of the next shard."""

    def shard(
        self,
        segments: Segments,
        text_sha256: str,
        before: Callable[[], object] = ...,
        number: int | None = None,
    ) -> AbstractContextManager[dict[int, ShardWriter]]:
        """See `TraceStore.shard`."""


class AtOnce:
    """Writes rows when they are handed over."""

    def __init__(self, store: Sharded) -> None:
        """Take the store."""
        self._store = store

    def __enter__(self) -> AtOnce:
        """Give it out."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave nothing to be done."""

    @contextmanager
    def shard(self, segments: Segments, text_sha256: str) -> Iterator[Sink]:
        """Yield the sink of a shard's rows, see `TraceStore.shard`; commit it at the end."""
        with self._store.shard(segments, text_sha256) as writers:
            yield lambda layer, rows: writers[layer].append(rows())


class Meanwhile:
    """Writes rows in threads; what they raise comes out of a later call, or at the end."""

    def __init__(self, store: Sharded) -> None:
        """Take the store."""
        self._store = store
        self._pool = ThreadPoolExecutor(SHARDS)
        self._number = store.next_shard
        self._lanes = min(_LANES, len(store.layers), os.cpu_count() or 1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Meanwhile:
        """Give it out."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Wait for the last shard to be committed."""
        self._pool.shutdown()
        if kind is None and self._last is not None:
            self._last.result()

    @contextmanager
    def shard(self, segments: Segments, text_sha256: str) -> Iterator[Sink]:
        """Yield the sink of a shard's rows; it is committed some time after the end of the block.

        A block that raises leaves nothing of the shard.
        """
        items: Queue[_Item] = Queue(_WAITING)
        before = self._last
        whole = partial(self._store.shard, segments, text_sha256, number=self._number)
        future = self._pool.submit(self._write, before, whole, items)
        self._last, self._number = future, self._number + 1

        def put(item: _Item) -> None:
            while True:
                for each in (before, future):
                    if each is not None and each.done():
                        each.result()  # its error, if it has one
                try:
                    items.put(item, timeout=_PATIENCE)
                    return
                except Full:
                    continue

        try:
            yield lambda layer, rows: put((layer, rows))
            put(None)
        except BaseException as error:
            # Also of the last `put`: the thread would wait for more for ever.
            self._give_up(items, future, error)
            raise

    def _write(
        self,
        before: Future[None] | None,
        shard: Callable[..., AbstractContextManager[dict[int, ShardWriter]]],
        items: Queue[_Item],
    ) -> None:
        """Write a shard as its rows come, until the end; nothing of it if the one before fails."""
        committed = (lambda: None) if before is None else before.result
        with shard(before=committed) as writers, Lanes(self._lanes, _WAITING) as lanes:
            while (item := items.get()) is not None:
                if isinstance(item, BaseException):
                    raise StoppedError from item
                layer, rows = item
                lanes.put(layer, partial(_append, writers[layer], rows))
            for layer, writer in writers.items():
                lanes.put(layer, writer.finish)
            lanes.wait()

    @staticmethod
    def _give_up(items: Queue[_Item], future: Future[None], error: BaseException) -> None:
        """Let the thread leave the shard as it is, whatever still waits."""
        while not future.done():
            try:
                items.put(error, timeout=_PATIENCE)
                break
            except Full:
                continue


def _append(writer: ShardWriter, rows: Arriving) -> None:
    writer.append(rows())
