"""Ways in which a file can be damaged, and many damaged copies of one."""

from __future__ import annotations

import resource
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.shared import own_bytes

LIES = [0, 1, 3, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
ALLOWED_BYTES = 256 << 20


@contextmanager
def little_memory() -> Iterator[None]:
    """Refuse the process more memory than a small damaged file has any right to ask for.

    Files that it maps do not count, however large they say they are.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (own_bytes() + ALLOWED_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


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


Edit = tuple[Callable[..., bytes], tuple[Any, ...]]
"""A function of this file and what it takes after the data, so that a failing one reads well."""


def edit(random: Random, size: int, places: Sequence[int]) -> Edit:
    """Draw an edit of a file of some size, in two of three cases at one of the given places."""
    at = random.randrange(size) if random.random() < 1 / 3 else random.choice(places)
    number = random.choice(LIES) if random.random() < 0.5 else random.randint(0, 20)
    edits: list[Edit] = [
        (truncated, (at,)),
        (flipped, (at, random.randrange(8))),
        (lying, (at, random.choice(["<B", "<I", "<Q"]), number)),
        (spliced, (at, random.choice([1, 4, 8, 24, 100, 1000]), random.choice([0, 2]))),
    ]
    return random.choice(edits)


def for_all_damages(
    data: bytes, places: Sequence[int], holds: Callable[[bytes], bool], *, examples: int
) -> tuple[int, int]:
    """Run a check on many damaged copies, the same ones every time, with little memory to spare.

    Each copy has one to three edits and is another than those before.

    Returns:
        How many it was true for, and how many there were.
    """
    random, passed, seen = Random(0), 0, {hash(data)}
    while len(seen) <= examples:
        edits = [edit(random, len(data), places) for _ in range(random.randint(1, 3))]
        content = data
        for change, arguments in edits:
            content = change(content, *arguments)
        if hash(content) in seen:
            continue
        seen.add(hash(content))
        try:
            with little_memory():
                passed += holds(content)
        except Exception as error:
            raise AssertionError(f"damaged by {edits}") from error
    return passed, examples


def compress(file: Path) -> None:
    """Pack a file of `torch.save`, which packs none."""
    with zipfile.ZipFile(file) as stored:
        parts = [(name, stored.read(name)) for name in stored.namelist()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as deflated:
        for name, content in parts:
            deflated.writestr(name, content)
