"""Work that goes on at the same time: several things, what is needed next, what can be flushed."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar, cast

Item = TypeVar("Item")
Made = TypeVar("Made")

_WORKERS = 2
_PAUSE = 0.1
"""Seconds between two flushes; a flush itself waits for the disk."""


def made_ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """Yield `make` of every item in order, the next ones being made while the last is in use.

    At most three are in memory. An exception of `make` comes out where its item would.
    """
    with ThreadPoolExecutor(max_workers=_WORKERS) as pool:
        ahead: deque[Future[Made]] = deque()
        for item in items:
            ahead.append(pool.submit(make, item))
            if len(ahead) > _WORKERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items in order, the next one being made while the last is in use."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(max_workers=1) as pool:
        following: Future[Item | object] = pool.submit(next, iterator, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, iterator, end)
            yield cast(Item, item)


@contextmanager
def flushed_meanwhile(descriptor: int) -> Iterator[None]:
    """Send an open file to disk while it grows, so that the last sync finds little to do.

    Raises:
        OSError: the disk refused; the system reports that to one sync only.
    """
    done, errors = threading.Event(), []

    def flush() -> None:
        try:
            while not done.wait(_PAUSE):
                os.fdatasync(descriptor)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=flush)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if errors:
        raise errors[0]


class Lanes:
    """Does things in threads: those of one lane in their order, several lanes at the same time."""

    def __init__(self, lanes: int, waiting: int) -> None:
        """Start the threads.

        Args:
            lanes: threads.
            waiting: things that may wait; whoever puts more waits himself.
        """
        self._pools = [ThreadPoolExecutor(1) for _ in range(lanes)]
        self._room = threading.Semaphore(waiting)
        self._futures: list[Future[None]] = []
        self._error: BaseException | None = None

    def __enter__(self) -> Lanes:
        """Give them out."""
        return self

    def __exit__(self, *error: object) -> None:
        """Drop what has not begun, and wait for what has."""
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def put(self, lane: int, work: Callable[[], object]) -> None:
        """Let something be done after what was put into its lane before.

        Raises:
            BaseException: what something that was put before has raised.
        """
        self._room.acquire()
        self._raise()
        self._futures.append(self._pools[lane % len(self._pools)].submit(self._do, work))

    def wait(self) -> None:
        """Wait until everything is done.

        Raises:
            BaseException: the first that something has raised.
        """
        futures, self._futures = self._futures, []
        for future in futures:
            future.result()
        self._raise()

    def _do(self, work: Callable[[], object]) -> None:
        try:
            if self._error is None:
                work()
        except BaseException as error:
            self._error = self._error or error
        finally:
            self._room.release()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class StoppedError(Exception):
    """Raised inside work that nobody waits for any more."""


def several_at_once(
    work: Callable[[Item, Callable[[], None]], Made], items: Iterable[Item], jobs: int
) -> Iterator[tuple[Item, Made]]:
    """Yield every item with what is made of it, as they finish, each by a thread of its own.

    Torch computes outside Python's global lock, and small matrices keep only one core busy. The
    first exception comes out and stops the rest.

    Args:
        work: takes an item and a function to be called now and then, which raises once the result
            is not wanted any more.
        items: such as layer numbers.
        jobs: items at once; they share torch's threads.
    """
    import torch

    threads, stop = torch.get_num_threads(), threading.Event()

    def go_on() -> None:
        if stop.is_set():
            raise StoppedError

    torch.set_num_threads(max(1, threads // jobs))
    try:
        with ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(work, item, go_on): item for item in items}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
