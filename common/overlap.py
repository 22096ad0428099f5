"""Work that goes on in the background: what is needed next, and what can be flushed already."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

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
