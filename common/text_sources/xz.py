"""What is in an xz file, which pyarrow does not unpack."""

from __future__ import annotations

from typing import Any

MOST_MEMORY = 1 << 28
"""Bytes that a file may want for its dictionary; `xz -9` makes files that want 65 MiB."""

_PIECE = 1 << 20


class Unpacked:
    """A stream of what any number of members hold, read as pyarrow's streams are."""

    def __init__(self, packed: Any) -> None:
        """Begin with the first member of a stream of bytes."""
        self._packed = packed
        self._member = _member()

    def read(self, size: int) -> bytes:
        """Return at least a byte unless it has ended, at most so many.

        Raises:
            OSError: truncated, damaged, no xz, or one that wants more than `MOST_MEMORY`.
        """
        from lzma import LZMAError

        while True:
            piece = b""
            if self._member.eof:
                if not (piece := self._behind_padding(self._member.unused_data)):
                    return b""
                self._member = _member()
            elif self._member.needs_input and not (piece := self._packed.read(_PIECE)):
                raise OSError("Truncated xz stream")
            try:
                data: bytes = self._member.decompress(piece, size)
            except LZMAError as error:
                raise OSError(str(error)) from error
            if data:
                return data

    def _behind_padding(self, piece: bytes) -> bytes:
        """Return bytes of the next member, none if there is none; zeros may stand before it."""
        while not (found := piece.lstrip(b"\0")):
            if not (piece := self._packed.read(_PIECE)):
                break
        return found


def _member() -> Any:
    from lzma import FORMAT_XZ, LZMADecompressor

    return LZMADecompressor(FORMAT_XZ, MOST_MEMORY)
