"""Documents as windows of token ids: traces and held-out perplexities see a text alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import cycle
from typing import TYPE_CHECKING

from architectures.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

LEAST_TOKENS = 64
"""With fewer tokens a perplexity says nothing."""


def document_windows(
    documents: Iterable[str], tokenizer: Tokenizer, context: int, *, as_powerinfer: bool = False
) -> Iterator[tuple[int, list[int]]]:
    """Yield the windows of all documents in order: BOS, then tokens of one document.

    Args:
        documents: texts.
        tokenizer: the model's tokenizer.
        context: longest window in tokens, BOS included; at least 2.
        as_powerinfer: begin every second window without BOS where PowerInfer puts none before a
            text, which is with byte-level vocabularies. What comes first then draws the attention
            that BOS draws otherwise, and neurons differ (docs/decisions/0012).

    Yields:
        The document's number and the window's token ids.
    """
    bos = [tokenizer.bos_id()]
    beginnings = cycle([bos, []] if as_powerinfer and tokenizer.byte_level else [bos])
    for number, document in enumerate(documents):
        tokens, start = tokenizer.encode(document), 0
        while start < len(tokens):
            begun = next(beginnings)
            end = start + context - len(begun)
            yield number, [*begun, *tokens[start:end]]
            start = end


def first_tokens(windows: Iterable[list[int]], tokens: int) -> Iterator[list[int]]:
    """Yield windows of at most `tokens` in all; a window of one token predicts nothing."""
    for window in windows:
        taken = window[:tokens]
        if len(taken) > 1:
            yield taken
        tokens -= len(taken)
        if tokens < 2:
            return


def growth_error(growths: torch.Tensor, tokens: torch.Tensor, growth: torch.Tensor) -> float:
    """Return the standard error of the logarithm of a perplexity's growth.

    Windows are drawn, not tokens, which hang together: it is told by how windows differ.

    Args:
        growths: (windows,) float64, what the sum of negative log-likelihoods grew by in each.
        tokens: (windows,) float64, of each that are predicted.
        growth: of all windows together, a token.
    """
    scatter = growths - growth * tokens
    return float(scatter.square().sum().sqrt() / tokens.sum())
