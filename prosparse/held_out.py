"""Held-out text as windows, cut as for traces, so that perplexities are the same quantity."""

from __future__ import annotations

from architectures.checkpoint import Checkpoint
from architectures.windows import LEAST_TOKENS, document_windows, first_tokens
from common.documents import read_documents
from common.errors import DataError


def held_out_windows(
    checkpoint: Checkpoint, data: str, field: str, tokens: int, context: int
) -> list[list[int]]:
    """Return windows of at most `tokens` token ids in all, each BOS and then one document's tokens.

    Args:
        checkpoint: the model; its context bounds a window.
        data: source of `common.documents.read_documents`.
        field: key of the text in it.
        tokens: most token ids, BOS included.
        context: longest window.

    Raises:
        DataError: the source cannot be read, or gives too few tokens.
        CheckpointError: no usable tokenizer.
    """
    tokenizer = checkpoint.tokenizer()
    longest = min(context, checkpoint.shape.context_length)
    cut = document_windows(read_documents(data, field), tokenizer, longest)
    windows = list(first_tokens((window for _, window in cut), tokens))
    found = sum(map(len, windows))
    if found < LEAST_TOKENS:
        raise DataError(
            f"{data}: gives {found} tokens, a perplexity needs at least {LEAST_TOKENS}",
            "pass more text or raise --tokens",
        )
    return windows
