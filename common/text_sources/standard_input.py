"""Standard input, kept as far as it was read, so that a command may look at it before its work."""

from __future__ import annotations

import io
import sys
import tempfile
import weakref
from functools import lru_cache
from typing import Any

from common.errors import DataError

_PIECE = 1 << 16


class _Kept:
    """A stream that cannot be rewound, and a file without a name of what was read from it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._file = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the process
        self._size = 0
        weakref.finalize(self, self._file.close)

    def read(self, offset: int, size: int) -> bytes:
        if offset < self._size:
            self._file.seek(offset)
            return self._file.read(min(size, self._size - offset))
        data: bytes = self._stream.read1(_PIECE)
        self._file.seek(self._size)
        self._file.write(data)
        self._size += len(data)
        return data[:size]


class StandardInput(io.RawIOBase):
    """Standard input from its beginning."""

    def __init__(self, kept: _Kept) -> None:
        """Begin at the beginning."""
        self._kept, self._offset = kept, 0

    def head(self, size: int) -> bytes:
        """Return the first bytes, at most so many; the next read begins there anew."""
        data, self._offset = b"", 0
        while len(data) < size and (more := self.read(size - len(data))):
            data += more
        self._offset = 0
        return data

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def read(self, size: int = _PIECE) -> bytes:
        """Return at least a byte unless it has ended, at most so many."""
        data = self._kept.read(self._offset, size)
        self._offset += len(data)
        return data


def standard_input() -> StandardInput:
    """Return standard input from its beginning, however much of it was read before.

    Raises:
        DataError: nothing is piped in.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError("standard input: is a terminal", "pipe text into the command")
    return StandardInput(_kept(sys.stdin.buffer))


@lru_cache(maxsize=1)
def _kept(stream: Any) -> _Kept:
    return _Kept(stream)
