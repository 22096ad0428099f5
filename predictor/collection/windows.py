"""Documents to token windows, windows to shards, and shards to batches.

A window is one sequence that the model sees on its own: the BOS token, but for every second one
where PowerInfer puts none, then tokens of a single document. Long documents give several windows;
no window crosses documents. Within a shard windows are ordered by length, so that a batch holds
little padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from architectures.tokenizer import Tokenizer
from architectures.windows import document_windows


@dataclass(frozen=True)
class Window:
    """A sequence of token ids and the document that it comes from."""

    document: int
    tokens: list[int]


def cut_windows(documents: Iterable[str], tokenizer: Tokenizer, context: int) -> Iterator[Window]:
    """Yield the windows of all documents in order, begun as PowerInfer begins texts.

    Args:
        documents: texts.
        tokenizer: the model's tokenizer.
        context: longest window in tokens, BOS included; at least 2.
    """
    for number, tokens in document_windows(documents, tokenizer, context, as_powerinfer=True):
        yield Window(number, tokens)


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


def order_windows(shard: Iterable[Window]) -> list[Window]:
    """Return the windows, longest first; equally long ones keep their order."""
    return sorted(shard, key=lambda window: -len(window.tokens))


def cut_batches(windows: Sequence[Window], tokens: int) -> Iterator[Sequence[Window]]:
    """Yield batches of neighbouring windows, each of at most `tokens` positions with padding.

    Args:
        windows: ordered by `order_windows`.
        tokens: positions of a batch; a window longer than that is a batch of its own.
    """
    start = 0
    while start < len(windows):
        size = max(1, tokens // len(windows[start].tokens))
        yield windows[start : start + size]
        start += size


def segments_of(windows: Iterable[Window]) -> tuple[tuple[int, int], ...]:
    """Return document number and rows of each run of rows of one document."""
    runs = groupby(windows, key=lambda window: window.document)
    return tuple((document, sum(len(window.tokens) for window in run)) for document, run in runs)


def text_sha256(windows: Iterable[Window]) -> str:
    """Return a checksum of all token ids and of where windows begin."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.array([len(window.tokens), *window.tokens], "<i8").tobytes())
    return digest.hexdigest()
