"""SentencePiece pieces with PowerInfer's algorithm.

Source: PowerInfer@d3ebd7c llama.cpp:llm_tokenizer_spm. Neighbours whose joined text is a token
merge, the highest score first and the leftmost among equals; what is no token in the end becomes
byte pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from gguf_export.tokens.pair_merges import merge_pairs

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
        for symbol in merge_pairs(symbols, self._order):
            number = self._ids.get(symbol)
            if number is None:
                ids.extend(self._ids[b"<0x%02X>" % byte] for byte in symbol)
            else:
                ids.append(number)
        return ids

    def _order(self, left: bytes, right: bytes) -> float | None:
        number = self._ids.get(left + right)
        return None if number is None else -self._scores[number]


def characters(data: bytes) -> list[bytes]:
    """Split UTF-8 into characters by their leading bytes, as llama.cpp does."""
    found, at = [], 0
    while at < len(data):
        size = _LENGTHS[data[at] >> 4]
        found.append(data[at : at + size])
        at += size
    return found
