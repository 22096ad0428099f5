"""Byte-level BPE with PowerInfer's algorithm.

Source: PowerInfer@d3ebd7c llama.cpp:llm_tokenizer_bpe, llama_vocab::find_bpe_rank and
unicode.h:bytes_to_unicode_bpe. Inside a word the pair of the lowest rank merges first, the
leftmost among equals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gguf_export.tokens.pair_merges import merge_pairs
from gguf_export.tokens.word_splitter import split_words


def _byte_tokens() -> tuple[str, ...]:
    """Return the character that stands for each byte: itself where printable, else from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelt = {byte: chr(byte) for byte in printable}
    spelt |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    return tuple(spelt[byte] for byte in range(256))


BYTE_TOKENS = _byte_tokens()


class ByteLevelEncoder:
    """Turns texts into ids."""

    def __init__(self, ids: Mapping[bytes, int], merges: Iterable[bytes]) -> None:
        """Take a vocabulary whose bytes and merge results are all tokens.

        Args:
            ids: id of each token.
            merges: `left right`, the best rank first.
        """
        self._ids = {token.decode("utf-8", "replace"): number for token, number in ids.items()}
        self._ranks: dict[tuple[str, str], int] = {}
        for rank, merge in enumerate(merges):
            left, _, right = merge.decode("utf-8", "replace").partition(" ")
            self._ranks.setdefault((left, right), rank)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that UTF-8 can hold."""
        ids: list[int] = []
        known: dict[str, list[int]] = {}
        for word in split_words(text):
            found = known.get(word)
            if found is None:
                found = known[word] = self._word_ids(word)
            ids += found
        return ids

    def _word_ids(self, word: str) -> list[int]:
        return [self._ids[symbol] for symbol in merge_pairs(list(spell(word)), self._rank)]

    def _rank(self, left: str, right: str) -> int | None:
        return self._ranks.get((left, right))


def spell(word: str) -> str:
    """Spell the UTF-8 bytes of a word in GPT-2's alphabet."""
    return "".join(BYTE_TOKENS[byte] for byte in word.encode())
