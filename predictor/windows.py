"""Documents to token windows, and windows to shards.

A window is one sequence that the model sees on its own: the BOS token, then tokens of a single
document. Long documents give several windows; no window crosses documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol


class Tokenizer(Protocol):
    """What windows need of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without special tokens."""
        ...

    def bos_id(self) -> int:
        """Return the id of the begin-of-sequence token."""
        ...


@dataclass(frozen=True)
class Window:
    """A sequence of token ids, BOS first, and the document that it comes from."""

    document: int
    tokens: list[int]


def cut_windows(documents: Iterable[str], tokenizer: Tokenizer, context: int) -> Iterator[Window]:
    """Yield the windows of all documents in order.

    Args:
        documents: texts.
        tokenizer: the model's tokenizer.
        context: longest window in tokens, BOS included; at least 2.
    """
    bos = tokenizer.bos_id()
    for number, document in enumerate(documents):
        tokens = tokenizer.encode(document)
        for start in range(0, len(tokens), context - 1):
            yield Window(number, [bos, *tokens[start : start + context - 1]])


def cut_shards(windows: Iterable[Window], rows: int, tokens: int) -> Iterator[list[Window]]:
    """Group windows into shards of about `rows` tokens, `tokens` in all.

    Every shard but the last has at least `rows` tokens; the last window is cut so that the total
    is exact unless the windows end first.
    """
    shard: list[Window] = []
    held, left = 0, tokens
    for window in windows:
        taken = Window(window.document, window.tokens[:left])
        shard.append(taken)
        held += len(taken.tokens)
        left -= len(taken.tokens)
        if held >= rows or not left:
            yield shard
            shard, held = [], 0
        if not left:
            return
    if shard:
        yield shard
