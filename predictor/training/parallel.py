"""Layers worked on at the same time, each by a thread of its own.

Torch computes outside Python's global lock, and small matrices keep only one core busy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

Result = TypeVar("Result")


class StoppedError(Exception):
    """Raised inside work that nobody waits for any more."""


def each_layer(
    work: Callable[[int, Callable[[], None]], Result], layers: Iterable[int], jobs: int
) -> Iterator[tuple[int, Result]]:
    """Yield every layer with its result, as they finish.

    The first exception comes out and stops the rest.

    Args:
        work: takes a layer and a function to be called now and then, which raises once the result
            is not wanted any more.
        layers: layer numbers.
        jobs: layers at once; they share torch's threads.
    """
    threads, stop = torch.get_num_threads(), threading.Event()

    def go_on() -> None:
        if stop.is_set():
            raise StoppedError

    torch.set_num_threads(max(1, threads // jobs))
    try:
        with ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(work, layer, go_on): layer for layer in layers}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
