"""Ways in which a file can be damaged, as hypothesis strategies."""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LIES = [0, 1, 3, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
ALLOWED_BYTES = 256 << 20


@contextmanager
def little_memory() -> Iterator[None]:
    """Refuse the process more memory than a small damaged file has any right to ask for."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + ALLOWED_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def truncated(data: bytes, at: int) -> bytes:
    """End a file early."""
    return data[:at]


def flipped(data: bytes, at: int, bit: int) -> bytes:
    """Turn one bit over."""
    changed = bytearray(data)
    if at < len(data):
        changed[at] ^= 1 << bit
    return bytes(changed)


def lying(data: bytes, at: int, code: str, number: int) -> bytes:
    """Overwrite a number, be it a length, a count, a type, a size or an offset."""
    size = struct.calcsize(code)
    return data[:at] + struct.pack(code, number % 2 ** (8 * size)) + data[at + size :]


def spliced(data: bytes, at: int, size: int, times: int) -> bytes:
    """Cut a piece out, or put it in twice."""
    return data[:at] + data[at : at + size] * times + data[at + size :]


def edits(size: int, places: Sequence[int]) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    """Return a strategy of one to three edits, mostly at the given places.

    An edit is a function of this file and what it takes after the data, so that a failing one
    prints readably.
    """
    chosen = st.sampled_from(places)
    at = st.one_of(chosen, chosen, st.integers(0, size - 1))
    numbers = st.one_of(st.sampled_from(LIES), st.integers(0, 20))
    sizes, times = st.sampled_from([1, 4, 8, 24, 100, 1000]), st.sampled_from([0, 2])
    edit = st.one_of(
        st.tuples(st.just(truncated), at),
        st.tuples(st.just(flipped), at, st.integers(0, 7)),
        st.tuples(st.just(lying), at, st.sampled_from(["<B", "<I", "<Q"]), numbers),
        st.tuples(st.just(spliced), at, sizes, times),
    )
    return st.lists(edit, min_size=1, max_size=3)


def for_all_damages(
    data: bytes, places: Sequence[int], holds: Callable[[bytes], bool], *, examples: int
) -> tuple[int, int]:
    """Run a check on many damaged copies, the same ones every time, with little memory to spare.

    Returns:
        How many it was true for, and how many there were.
    """
    results: list[bool] = []

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(edits(len(data), places))
    def each(chosen: list[tuple[Any, ...]]) -> None:
        content = data
        for edit, *arguments in chosen:
            content = edit(content, *arguments)
        with little_memory():
            results.append(holds(content))

    each()
    return sum(results), len(results)
