"""PowerInfer's split into words; expected values were read off a program linked with PowerInfer."""

from __future__ import annotations

import hashlib
import sys
import time

import pytest

from gguf_export.tokens.encoders import (
    _DIGIT,
    _LETTER,
    _OTHER,
    _WHITESPACE,
    BYTE_TOKENS,
    ByteLevelEncoder,
    _kind,
    split_words,
)
from gguf_export.tokens.model_vocabulary import MIXED_TEXTS

WORDS = {
    "": [],
    "a": ["a"],
    "Hello world": ["Hello", " world"],
    "a.b": ["a", ".b"],
    "left-hand 12,5 %": ["left", "-hand", " 12", ",5", " %"],
    "one\ntwo": ["one", "\ntwo"],
    "one\n\ntwo": ["one", "\n", "\ntwo"],
    "a   b": ["a", "  ", " b"],
    "a   (b)": ["a", "   ", "(b)"],
    "end.": ["end."],
    "trailing  ": ["trailing", "  "],
    "I'll it's": ["I", "'ll", " it", "'s"],
    "('s')": ["(", "'s", "')"],
    " 's": [" ", "'s"],
    "x½ y²": ["x", "½", " y²"],
    "\u0345a\u0301b": ["\u0345", "a\u0301b"],
    "a\x1cb\u2028c": ["a", "\x1cb", "\u2028c"],
}


@pytest.mark.parametrize(("text", "expected"), WORDS.items(), ids=map(repr, WORDS))
def test_words_are_powerinfers(text: str, expected: list[str]) -> None:
    assert split_words(text) == expected


def test_nothing_of_a_text_is_lost() -> None:
    for text in MIXED_TEXTS:
        assert "".join(split_words(text)) == text


def test_every_code_point_is_classed_as_in_unicode_h() -> None:
    """The digest is of PowerInfer's table (Unicode 13), whatever this Python's Unicode."""
    codes = {_LETTER: 1, _DIGIT: 2, _WHITESPACE: 3, _OTHER: 0}
    table = bytes(codes[_kind(chr(number))] for number in range(sys.maxunicode + 1))
    expected = "277f0607417c78e9ecdc56418b7b4b4c2df29781b65b828f4ad7ddc7f012e238"
    assert hashlib.sha256(table).hexdigest() == expected


@pytest.mark.parametrize("text", ["a" * (390 * 256 + 64), "word. " * 17_000, "\n (" * 33_000])
def test_a_long_text_takes_time_in_proportion(text: str) -> None:
    """Comparing each character with each would take minutes."""
    ids = {character.encode(): byte for byte, character in enumerate(BYTE_TOKENS)}
    merges = []
    for number in range(8):
        left = b"a" * 2**number
        merges.append(left + b" " + left)
        ids[left + left] = 256 + number
    start = time.perf_counter()
    encoded = ByteLevelEncoder(ids, merges).encode(text)
    assert time.perf_counter() - start < 6
    assert len(encoded) == (391 if text.startswith("aa") else len(text))
