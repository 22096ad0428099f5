"""Hashes of whole files: taken as they are written, or read once and remembered while they stay."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm
from xxhash import xxh3_128

from common.cache import cache_directory
from common.errors import DataError, OutputError
from common.files import refuse_special
from common.sealed import read_sealed, write_sealed
from common.typed_json import Closed, Count, JsonError, parse, plain

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PIECE = 1 << 20
"""Bytes that are read at once into one place: a processor's cache holds them until they are hashed.
With sixteen times as many, each in a place of its own, it takes five times as long."""

_SMALL = 1 << 28  # no progress bar for what is read in a moment
_KEPT = 1 << 26
"""Files from this size on are remembered; smaller ones are read again in no time."""

_MOST = 4096
"""Files that are remembered, the latest."""


@dataclass(frozen=True, kw_only=True)
class HashedFile(Closed):
    """What a file holds.

    Attributes:
        name: of the file, without directories.
        bytes: its size.
        xxh3_128: its hash, hexadecimal.
    """

    name: str
    bytes: Count
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class _Remembered(Closed):
    bytes: Count
    mtime_ns: int
    ctime_ns: int
    inode: Count
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class _Memory:
    files: dict[str, _Remembered]


class HashedWriter(io.BufferedWriter):
    """A file that is written from its begin to its end, and hashed as it is."""

    def __init__(self, raw: io.RawIOBase, begun: bytes) -> None:
        """Go on with a file.

        Args:
            raw: the file, at its end.
            begun: what it holds.
        """
        super().__init__(raw)
        self._state, self._size = xxh3_128(begun), len(begun)

    def write(self, data: ReadableBuffer) -> int:
        """Write bytes, all of them.

        Raises:
            OSError: the system refused.
        """
        self._take(data)
        return super().write(data)

    def _take(self, data: ReadableBuffer) -> None:
        self._state.update(data)
        self._size += memoryview(data).nbytes

    def hashed(self, name: str) -> HashedFile:
        """Return what was written, under a name."""
        return HashedFile(name=name, bytes=self._size, xxh3_128=self._state.hexdigest())


def hash_file(path: Path, piece: int = _PIECE) -> tuple[int, str]:
    """Return a file's bytes and its XXH3-128, hexadecimal; it is read piece by piece.

    Raises:
        DataError: it cannot be read.
    """
    state, size = xxh3_128(), 0
    refuse_special(path, DataError, "check that the file can be read")
    try:
        total = path.stat().st_size
        place = memoryview(bytearray(max(1, min(piece, total))))
        with (
            path.open("rb", buffering=0) as file,
            tqdm(
                total=total,
                unit="B",
                unit_scale=True,
                desc=f"hash {path.name}",
                disable=True if total < _SMALL else None,
            ) as bar,
        ):
            while count := file.readinto(place):
                state.update(place[:count])
                size += count
                bar.update(count)
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}", "check that the file can be read"
        ) from error
    return size, state.hexdigest()


def hash_files(paths: Iterable[Path]) -> tuple[HashedFile, ...]:
    """Hash files in order, large ones only if size, times or inode have changed since.

    One of the times is the system's own, that nobody can set back: a copy that keeps the time of
    what it is of, or a clock that goes back, hides no change.

    What is remembered lies in `hashes.json` of psp's cache directory; where that cannot be written
    every file is read.

    Raises:
        DataError: one cannot be read.
    """
    memory = _recall()
    found, before = [], dict(memory)
    for path in paths:
        key, facts = str(path.resolve()), _facts(path)
        known = memory.pop(key, None)
        if known is None or (known.mtime_ns, known.ctime_ns, known.inode, known.bytes) != facts:
            size, digest = hash_file(path)
            modified, changed, inode, _ = facts
            known = _Remembered(
                bytes=size, mtime_ns=modified, ctime_ns=changed, inode=inode, xxh3_128=digest
            )
        if known.bytes >= _KEPT:
            memory[key] = known
        found.append(HashedFile(name=path.name, bytes=known.bytes, xxh3_128=known.xxh3_128))
    if memory != before:
        kept = dict(list(memory.items())[-_MOST:])
        with suppress(OutputError):
            write_sealed(_file(), plain(_Memory(files=kept)))
    return tuple(found)


def _facts(path: Path) -> tuple[int, int, int, int]:
    try:
        facts = os.stat(path)
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}", "check that the file can be read"
        ) from error
    return facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, facts.st_size


def _recall() -> dict[str, _Remembered]:
    """Return what is remembered; a file that is missing or damaged holds nothing."""
    try:
        return parse(_Memory, read_sealed(_file(), DataError, "")).files
    except (DataError, JsonError, json.JSONDecodeError):
        return {}


def _file() -> Path:
    return cache_directory() / "hashes.json"
