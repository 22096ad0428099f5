"""Merging of neighbouring symbols, the loop that both of llama.cpp's tokenizers share.

Source: PowerInfer@d3ebd7c llama.cpp:llm_tokenizer_spm, llm_tokenizer_bpe.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TypeVar

Symbol = TypeVar("Symbol", str, bytes)


def merge_pairs(
    symbols: list[Symbol], order: Callable[[Symbol, Symbol], float | None]
) -> list[Symbol]:
    """Merge neighbours until none can be, the lowest order first, then the leftmost.

    Args:
        symbols: the beginning; it is used up.
        order: of merging two neighbours, None where they do not merge.
    """
    nothing = symbols[0][:0] if symbols else None
    following = [*range(1, len(symbols)), -1]
    previous = list(range(-1, len(symbols) - 1))
    queue: list[tuple[float, int, int, int]] = []

    def offer(left: int, right: int) -> None:
        if left < 0 or right < 0:
            return
        place = order(symbols[left], symbols[right])
        if place is not None:
            size = len(symbols[left]) + len(symbols[right])
            heapq.heappush(queue, (place, left, right, size))

    for left, right in enumerate(following):
        offer(left, right)
    while queue:
        _, left, right, size = heapq.heappop(queue)
        # A merged-away symbol is empty; a grown one makes the joined length differ.
        if not symbols[left] or not symbols[right]:
            continue
        if len(symbols[left]) + len(symbols[right]) != size:
            continue
        assert nothing is not None
        symbols[left], symbols[right] = symbols[left] + symbols[right], nothing
        following[left] = following[right]
        if following[right] >= 0:
            previous[following[right]] = left
        offer(previous[left], left)
        offer(left, following[left])
    return [symbol for symbol in symbols if symbol]
