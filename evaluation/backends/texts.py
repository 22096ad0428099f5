"""Texts of what models wrote."""

from __future__ import annotations

from collections.abc import Sequence

from architectures.tokenizer import Tokenizer

_BEFORE = (4, 16, 64)
"""Tokens of the prompt that are decoded with a continuation, tried in turn."""

_SLACK = 4
"""Tokens more than a stop text has bytes, for what is not whole yet."""


def continuation_of(tokenizer: Tokenizer, prompt: Sequence[int], made: Sequence[int]) -> str:
    """Return the text that ids add to a prompt.

    Decoded alone they would lose a space in front, which SentencePiece takes for the one that it
    puts before a text itself: code that begins with four spaces would begin with three.

    Args:
        tokenizer: the checkpoint's own.
        prompt: ids before them.
        made: the ids.
    """
    for count in _BEFORE:
        before = list(prompt[-count:])
        known = tokenizer.decode(before)
        whole = tokenizer.decode([*before, *made])
        if whole.startswith(known):  # not where a character begins in one and ends in the other
            return whole[len(known) :]
    return tokenizer.decode(list(made))


def ends_within(
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[str],
    number: int,
    made: Sequence[int],
) -> bool:
    """Tell whether a stop text has just been written.

    Args:
        tokenizer: the checkpoint's own.
        prompts: ids of every prompt.
        stop: texts that end a continuation.
        number: of the prompt that is continued.
        made: ids of its continuation so far; it is asked after each.
    """
    if not stop or not made:
        return False
    longest = max(len(each.encode()) for each in stop) + _SLACK
    begun = len(made) <= longest
    tail = list(made[-longest:])
    text = continuation_of(tokenizer, prompts[number], tail) if begun else tokenizer.decode(tail)
    return any(each in text for each in stop)
