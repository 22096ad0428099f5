"""Held-out text as windows, cut as for traces, so that perplexities are the same quantity."""

from __future__ import annotations

from collections.abc import Callable

from architectures.checkpoint import Checkpoint
from architectures.windows import LEAST_TOKENS, document_windows, first_tokens
from common.documents import read_documents
from common.errors import DataError
from common.text_sources.names import Sources, shown


def held_out_windows(
    checkpoint: Checkpoint,
    data: Sources,
    field: str,
    tokens: int,
    context: int,
    note: Callable[[str], None] = lambda line: None,
) -> list[list[int]]:
    """Return windows of at most `tokens` token ids in all, each BOS and then one document's tokens.

    Args:
        checkpoint: the model; its context bounds a window.
        data: sources of `common.documents.read_documents`.
        field: key of the text in it.
        tokens: most token ids, BOS included.
        context: longest window.
        note: takes lines about what was passed over.

    Raises:
        DataError: the source cannot be read, or gives too few tokens.
        CheckpointError: no usable tokenizer.
    """
    tokenizer = checkpoint.tokenizer()
    longest = min(context, checkpoint.shape.context_length)
    documents = read_documents(data, field)
    cut = document_windows(documents, tokenizer, longest)
    windows = list(first_tokens((window for _, window in cut), tokens))
    for line in documents.notes:
        note(line)
    found = sum(map(len, windows))
    if found < LEAST_TOKENS:
        raise DataError(
            f"{shown(data)}: gives {found} tokens, a perplexity needs at least {LEAST_TOKENS}",
            "pass more text or raise --tokens",
        )
    return windows
