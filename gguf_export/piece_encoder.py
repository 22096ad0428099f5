"""SentencePiece pieces with PowerInfer's algorithm.

Source: PowerInfer@d3ebd7c llama.cpp:llm_tokenizer_spm. Neighbours whose joined text is a token
merge, the highest score first and the leftmost among equals; what is no token in the end becomes
byte pieces.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

SPACE = "\u2581".encode()
_LENGTHS = (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4)


class PieceEncoder:
    """Turns bytes into ids."""

    def __init__(self, ids: Mapping[bytes, int], scores: Sequence[float]) -> None:
        """Take a vocabulary that has all 256 byte pieces.

        Args:
            ids: id of each token.
            scores: score of each id.
        """
        self._ids, self._scores = ids, scores
        # Two characters that are neighbours in no token are never merged: a text may be cut there.
        self._joined = {
            left + right for token in ids for left, right in pairwise(characters(token))
        }

    def encode(self, data: bytes) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = []
        known: dict[bytes, list[int]] = {}
        for segment in self._segments(characters(data.replace(b" ", SPACE))):
            key = b"".join(segment)
            found = known.get(key)
            if found is None:
                found = known[key] = self._segment_ids(segment)
            ids += found
        return ids

    def _segments(self, symbols: list[bytes]) -> Iterator[list[bytes]]:
        start = 0
        for at in range(1, len(symbols)):
            if symbols[at - 1] + symbols[at] not in self._joined:
                yield symbols[start:at]
                start = at
        if symbols:
            yield symbols[start:]

    def _segment_ids(self, symbols: list[bytes]) -> list[int]:
        ids: list[int] = []
        for symbol in self._merge(symbols):
            number = self._ids.get(symbol)
            if number is None:
                ids.extend(self._ids[b"<0x%02X>" % byte] for byte in symbol)
            else:
                ids.append(number)
        return ids

    def _merge(self, symbols: list[bytes]) -> list[bytes]:
        following = [*range(1, len(symbols)), -1]
        previous = list(range(-1, len(symbols) - 1))
        queue: list[tuple[float, int, int, bytes]] = []

        def offer(left: int, right: int) -> None:
            if left < 0 or right < 0:
                return
            joined = symbols[left] + symbols[right]
            number = self._ids.get(joined)
            if number is not None:
                heapq.heappush(queue, (-self._scores[number], left, right, joined))

        for left, right in enumerate(following):
            offer(left, right)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            # A merged-away symbol is empty; a grown one makes the joined length differ.
            if not symbols[left] or not symbols[right]:
                continue
            if len(symbols[left]) + len(symbols[right]) != len(joined):
                continue
            symbols[left], symbols[right] = joined, b""
            following[left] = following[right]
            if following[right] >= 0:
                previous[following[right]] = left
            offer(previous[left], left)
            offer(left, following[left])
        return [symbol for symbol in symbols if symbol]


def characters(data: bytes) -> list[bytes]:
    """Split UTF-8 into characters by their leading bytes, as llama.cpp does."""
    found, at = [], 0
    while at < len(data):
        size = _LENGTHS[data[at] >> 4]
        found.append(data[at : at + size])
        at += size
    return found
