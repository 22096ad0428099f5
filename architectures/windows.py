"""Documents as windows of token ids: traces and held-out perplexities see a text alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from architectures.tokenizer import Tokenizer


def document_windows(
    documents: Iterable[str], tokenizer: Tokenizer, context: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield the windows of all documents in order: BOS, then tokens of one document.

    Args:
        documents: texts.
        tokenizer: the model's tokenizer.
        context: longest window in tokens, BOS included; at least 2.

    Yields:
        The document's number and the window's token ids.
    """
    bos = tokenizer.bos_id()
    for number, document in enumerate(documents):
        tokens = tokenizer.encode(document)
        for start in range(0, len(tokens), context - 1):
            yield number, [bos, *tokens[start : start + context - 1]]
