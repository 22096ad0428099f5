"""Bytes of text files: unpacked, ahead of whoever reads them, and cut into lines of bounded size.

Files are compressed in gzip, zstd, bzip2 or xz, of any number of members; they are unpacked outside
the interpreter's lock, in a thread that is one piece ahead.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any, cast

from common.errors import DataError, reason
from common.text_sources import xz
from common.text_sources.names import STANDARD_INPUT, XZ, TextFile
from common.text_sources.standard_input import standard_input
from common.units import decimal_size

LONGEST_LINE = 1 << 27
"""Bytes of a line: more is taken for damage, or for a bomb of a few compressed bytes, and would
have to be held in memory as a whole."""

_PIECE = 1 << 23
"""Bytes read at once; small pieces wait for the interpreter's lock more often than they are
worth."""

_BUFFER = 1 << 20
_LAST_PIECES = 1 << 12, 1  # before damage
_HEAD = 1 << 16
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": XZ,
}
_LONGEST_MAGIC = max(map(len, _MAGIC))


_OTHER_FORMAT = ("header check", "magic", "descriptor", "format not supported")
"""In what zlib, bzip2, zstd and xz say of the first bytes of another kind of file."""


def lines(file: TextFile) -> Iterator[bytes]:
    r"""Yield the lines with their ends, which are \n, \r\n or \r; a byte order mark is left out.

    Raises:
        DataError: unreadable or damaged, by the last line before the damage, or a line is longer
            than `LONGEST_LINE`.
    """
    return _Reading(file).lines()


def of_known_kind(file: TextFile) -> TextFile:
    """Return a file whose kind is known: standard input tells it by how its text begins.

    An object is the first of JSON lines, an array of objects is JSON, anything else plain text.

    Raises:
        DataError: standard input is a terminal, or damaged.
    """
    if file.kind is not None:
        return file
    text = bytes(_Reading(file).head()).removeprefix(codecs.BOM_UTF8).lstrip()
    first = text[:1] + text[1:].lstrip()[:1]
    kind = ".jsonl" if first.startswith(b"{") else ".json" if first == b"[{" else ".txt"
    return replace(file, kind=kind)


class _Reading:
    """A file that is read once, and how many of its lines have been."""

    def __init__(self, file: TextFile) -> None:
        self._file = file
        self._line = 0

    def head(self) -> bytearray:
        head = bytearray()
        with suppress(DataError):  # whoever reads on meets it
            for piece in self._pieces():
                head += piece
                if len(head) >= _HEAD:
                    break
        return head

    def lines(self) -> Iterator[bytes]:
        for line in self._cut(self._pieces()):
            self._line += 1
            yield line if self._line > 1 else line.removeprefix(codecs.BOM_UTF8)

    def _cut(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        held: list[bytes] = []
        size = 0
        for piece in pieces:
            held.append(piece)
            size += len(piece)
            # A last \r may be half of a \r\n, whose other half is in the next piece.
            if piece.find(b"\n") >= 0 or piece.find(b"\r", 0, -1) >= 0:
                whole = b"".join(held).splitlines(keepends=True)
                rest = b"" if whole[-1].endswith(b"\n") else whole.pop()
                yield from whole
                held, size = [rest], len(rest)
            if size > LONGEST_LINE:
                raise DataError(
                    f"{self._file.name}:{self._line + 1}: longer than {decimal_size(LONGEST_LINE)}",
                    "break the line, or look whether the file is text",
                )
        yield from b"".join(held).splitlines(keepends=True)

    def _pieces(self) -> Iterator[bytes]:
        done = 0
        try:
            with _opened(self._file) as stream:
                # Whoever writes to a pipe may not go on, for which nobody shall wait in the end.
                in_turn = self._file.place == STANDARD_INPUT
                for piece in _in_turn(stream) if in_turn else _ahead(stream):
                    done += len(piece)
                    yield piece
        except OSError as error:
            if isinstance(error.__context__, GeneratorExit):
                return  # of a file that nobody reads on, and whose disk is gone
            if error.errno is not None:
                raise DataError(f"{self._file.name}: {error.strerror}", "check --data") from error
            yield from self._up_to_damage(done)

    def _up_to_damage(self, done: int) -> Iterator[bytes]:
        """Yield what is whole behind the first bytes, and name the line where that ends.

        A piece that is not whole is lost, so the last ones are single bytes.
        """
        damage = OSError()
        for size in _LAST_PIECES:
            with _opened(self._file) as stream:
                _skip(stream, done)
                try:
                    while piece := stream.read(size):
                        done += len(piece)
                        yield piece
                except OSError as error:
                    damage = error
        raise _damage(self._file, damage, self._line) from damage


def _skip(stream: Any, size: int) -> None:
    while size:
        size -= len(stream.read(min(size, _PIECE)))


def _in_turn(stream: Any) -> Iterator[bytes]:
    while piece := stream.read(_PIECE):
        yield piece


def _ahead(stream: Any) -> Iterator[bytes]:
    pool = ThreadPoolExecutor(1)
    ahead = pool.submit(stream.read, _PIECE)
    try:
        while piece := ahead.result():
            ahead = pool.submit(stream.read, _PIECE)
            yield piece
    finally:
        # Nobody closes the stream while it is read. Joining the thread would be too much: whoever
        # collects garbage ends readings that were given up, and may be a thread about to start,
        # with the lock held that joining takes (CPython 3.11 threading.py:_set_tstate_lock, _stop).
        wait([ahead])
        pool.shutdown(wait=False)


def _damage(file: TextFile, error: OSError, line: int) -> DataError:
    said = reason(error)
    after = f"after line {line}" if line else "before its first line ends"
    if "Truncated" in said:
        return DataError(f"{file.name}: cut off {after}", "fetch or write it again")
    if "usage limit" in said:
        return DataError(f"{file.name}: cannot be unpacked ({said})", "unpack it and pass that")
    if not line and any(each in said for each in _OTHER_FORMAT):
        return DataError(
            f"{file.name}: not compressed as its name says ({said})", "give it the right suffix"
        )
    return DataError(f"{file.name}: damaged {after} ({said})", "fetch or write it again")


@contextmanager
def _opened(file: TextFile) -> Iterator[Any]:
    """Open a file to read its bytes, unpacked."""
    with ExitStack() as stack:
        codec, raw = file.compression, cast(Any, None)
        if file.place == STANDARD_INPUT:
            raw = stack.enter_context(standard_input())
            head = raw.head(_LONGEST_MAGIC)
            codec = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
        elif "://" in file.place:
            import fsspec

            raw = stack.enter_context(fsspec.open(file.place, "rb"))
        elif codec is None:
            # Closed by the stack alone: the collector may meet the file object first, and warn.
            descriptor = os.open(file.place, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            raw = stack.enter_context(open(descriptor, "rb", buffering=0, closefd=False))
        yield raw if codec is None else stack.enter_context(_unpacked(file, raw, codec))


@contextmanager
def _unpacked(file: TextFile, raw: Any, codec: str) -> Iterator[Any]:
    """Unpack what Python reads, or a file of this machine, where there is nothing yet."""
    import pyarrow

    if raw is None:
        if not os.path.getsize(file.place):
            raise DataError(f"{file.name}: is empty, and no {codec}", "fetch or write it again")
        source = pyarrow.OSFile(file.place)
    else:
        source = pyarrow.BufferedInputStream(pyarrow.PythonFile(raw, mode="r"), _BUFFER)
    with source:
        if codec == XZ:
            yield xz.Unpacked(source)
            return
        with pyarrow.CompressedInputStream(source, codec) as stream:
            yield stream
