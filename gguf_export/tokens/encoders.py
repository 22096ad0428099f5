"""PowerInfer's two tokenizers: how texts become ids.

Pieces of SentencePiece: neighbours whose joined text is a token merge, the highest score first and
the leftmost among equals; what is no token in the end becomes byte pieces. Byte-level BPE: texts
are split into words, and inside a word the pair of the lowest rank merges first, the leftmost among
equals. Source: PowerInfer@d3ebd7c llama.cpp:llm_tokenizer_spm, llm_tokenizer_bpe,
llama_vocab::find_bpe_rank and unicode.h.

The split into words (llm_tokenizer_bpe::bpe_gpt2_preprocess) is meant to be GPT-2's regular
expression but differs: the character that ends a word belongs to the next one whatever follows
(`a.b` is `a`, `.b`; a newline goes with the word after it), a contraction is one wherever it stands
(`('s')`), a run of whitespace swallows punctuation that follows it, the last character never starts
a word, and numbers are only what Unicode 13 calls a digit.
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from operator import add
from typing import NoReturn, TypeVar

from common.errors import DataError

Symbol = TypeVar("Symbol", str, bytes)

SPACE = "\u2581".encode()
_CHARACTER = re.compile(
    rb"[\x00-\xbf]|[\xc0-\xdf].?|[\xe0-\xef].{0,2}|[\xf0-\xff].{0,3}", re.DOTALL
)
_LETTER, _DIGIT, _WHITESPACE, _OTHER, _END = range(5)
_SHORT = frozenset("stmd")
_LONG = frozenset(("re", "ve", "ll"))
_NEWER = (
    "558-558 58b-58c 870-887 889-88f 8b5-8b5 8c8-8c9 c5c-c5d cdc-cdd 170d-170d 171f-171f 1b4c-1b4c "
    "1c89-1c8a 208f-208f 209d-209f 2c2f-2c2f 2c5f-2c5f 9ffd-9fff a7c0-a7c1 a7cb-a7dd a7e2-a7e2 "
    "a7f1-a7f4 ab6c-ab6d 10570-1057a 1057c-1058a 1058c-10592 10594-10595 10597-105a1 105a3-105b1 "
    "105b3-105b9 105bb-105bc 105c0-105f3 10780-10785 10787-107b0 107b2-107bf 10940-10959 "
    "10d40-10d65 10d6f-10d85 10ec2-10ec7 10ed9-10eee 10f70-10f81 11071-11072 11075-11075 "
    "1123f-11240 11380-11389 1138b-1138b 1138e-1138e 11390-113b5 113b7-113b7 113d1-113d1 "
    "113d3-113d3 116d0-116e3 11740-11746 11ab0-11abf 11b0a-11b0a 11bc0-11be0 11bf0-11bf9 "
    "11db0-11ddb 11de0-11de9 11df1-11df1 11f02-11f02 11f04-11f10 11f12-11f33 11f50-11f59 "
    "12f90-12ff0 1342f-1342f 13441-13446 13460-143fa 16100-1611d 16130-16139 16a70-16abe "
    "16ac0-16ac9 16d40-16d6c 16d70-16d79 16ea0-16eb8 16ebb-16ed3 16ff2-16ff3 187f8-187ff "
    "18cd6-18cda 18cff-18cff 18d09-18d20 18d80-18df2 18e00-19191 191a0-191d2 1aff0-1aff3 "
    "1aff5-1affb 1affd-1affe 1b11f-1b128 1b132-1b132 1b155-1b155 1b168-1b168 1ccf0-1ccf9 "
    "1d6a6-1d6a6 1df00-1df81 1df90-1df96 1dfcd-1dfff 1e030-1e06d 1e290-1e2ad 1e4d0-1e4eb "
    "1e4f0-1e4f9 1e5d0-1e5ed 1e5f0-1e5fa 1e6c0-1e6de 1e6e0-1e6e2 1e6e4-1e6e5 1e6e7-1e6ed "
    "1e6f0-1e6f4 1e6fe-1e6ff 1e7e0-1e7e6 1e7e8-1e7eb 1e7ed-1e7ee 1e7f0-1e7fe 2a6de-2a6df "
    "2b735-2b73f 2b81e-2b81e 2cea2-2cead 2ebf0-2ee5d 31350-33479 3d000-3fc3f"
)
"""Letters and digits that Unicode got after version 13, in hexadecimal: Python may know them."""


def _ids_of_parts(parts: Iterable[Symbol], ids_of: Callable[[Symbol], list[int]]) -> list[int]:
    """Return the ids of all parts of a text, each part looked at once."""
    known: dict[Symbol, list[int]] = {}
    ids: list[int] = []
    for part in parts:
        if part not in known:
            known[part] = ids_of(part)
        ids += known[part]
    return ids


class PieceEncoder:
    """Turns bytes into ids."""

    def __init__(self, ids: Mapping[bytes, int], scores: Sequence[float]) -> None:
        """Take a vocabulary; of a byte without a piece a text is refused.

        Args:
            ids: id of each token.
            scores: score of each id.
        """
        self._ids, self._scores = ids, scores
        # Two characters that are neighbours in no token are never merged: a text may be cut there.
        self._joined = {
            left + right for token in ids for left, right in pairwise(characters(token))
        }

    def encode(self, data: bytes) -> list[int]:
        """Return the ids of a text.

        Raises:
            DataError: a byte that is needed has no piece: PowerInfer stops there.
        """
        return _ids_of_parts(
            self._segments(characters(data.replace(b" ", SPACE))), self._segment_ids
        )

    def _segments(self, symbols: list[bytes]) -> Iterator[bytes]:
        pairs = enumerate(map(add, symbols, symbols[1:]), 1)
        cuts = [at for at, pair in pairs if pair not in self._joined]
        for start, end in pairwise([0, *cuts, len(symbols)]):
            yield symbols[start] if end == start + 1 else b"".join(symbols[start:end])

    def _segment_ids(self, segment: bytes) -> list[int]:
        ids: list[int] = []
        for symbol in merge_pairs(characters(segment), self._order):
            number = self._ids.get(symbol)
            if number is None:
                ids.extend(self._byte_id(byte) for byte in symbol)
            else:
                ids.append(number)
        return ids

    def _byte_id(self, byte: int) -> int:
        number = self._ids.get(b"<0x%02X>" % byte)
        return _refuse_byte(byte) if number is None else number

    def _order(self, left: bytes, right: bytes) -> float | None:
        number = self._ids.get(left + right)
        return None if number is None else -self._scores[number]


def _refuse_byte(byte: int) -> NoReturn:
    raise DataError(
        f"the text holds byte 0x{byte:02X}, of which the model's vocabulary has no token and at "
        "which PowerInfer stops",
        "remove it",
    )


def characters(data: bytes) -> list[bytes]:
    """Split UTF-8 into characters by their leading bytes, as llama.cpp does."""
    return _CHARACTER.findall(data)


_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_SHIFTED = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_TOKENS = tuple(
    chr(byte if byte in _PRINTABLE else 256 + _SHIFTED.index(byte)) for byte in range(256)
)
"""The character that stands for each byte: itself where printable, else from U+0100."""


class ByteLevelEncoder:
    """Turns texts into ids."""

    def __init__(self, ids: Mapping[bytes, int], merges: Iterable[bytes]) -> None:
        """Take a vocabulary whose merge results are all tokens, and the bytes that texts need.

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
        """Return the ids of a text that UTF-8 can hold.

        Raises:
            DataError: it holds a byte that is no token: PowerInfer throws there.
        """
        return _ids_of_parts(split_words(text), self._word_ids)

    def _word_ids(self, word: str) -> list[int]:
        return [self._id(symbol) for symbol in merge_pairs(list(spell(word)), self._rank)]

    def _id(self, symbol: str) -> int:
        number = self._ids.get(symbol)
        return _refuse_byte(BYTE_TOKENS.index(symbol)) if number is None else number

    def _rank(self, left: str, right: str) -> int | None:
        return self._ranks.get((left, right))


def spell(word: str) -> str:
    """Spell the UTF-8 bytes of a word in GPT-2's alphabet."""
    return "".join(BYTE_TOKENS[byte] for byte in word.encode())


def merge_pairs(
    symbols: list[Symbol], order: Callable[[Symbol, Symbol], float | None]
) -> list[Symbol]:
    """Merge neighbours until none can be, the lowest order first, then the leftmost.

    Args:
        symbols: the beginning; it is used up.
        order: of merging two neighbours, None where they do not merge.
    """
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
        symbols[left], symbols[right] = symbols[left] + symbols[right], symbols[right][:0]
        following[left] = following[right]
        if following[right] >= 0:
            previous[following[right]] = left
        offer(previous[left], left)
        offer(left, following[left])
    return [symbol for symbol in symbols if symbol]


@cache
def _newer() -> tuple[list[int], list[int]]:
    pairs = [pair.split("-") for pair in _NEWER.split()]
    return [int(first, 16) for first, _ in pairs], [int(last, 16) for _, last in pairs]


@cache
def _kind(character: str) -> int:
    if character.isspace():
        return _WHITESPACE
    firsts, lasts = _newer()
    at = bisect_right(firsts, ord(character)) - 1
    if at >= 0 and ord(character) <= lasts[at]:
        return _OTHER
    if unicodedata.category(character).startswith("L"):
        return _LETTER
    return _DIGIT if character.isdigit() else _OTHER


def split_words(text: str) -> list[str]:
    """Cut a text into the words whose bytes PowerInfer merges; joined they are the text."""
    kinds = [*map(_kind, text), _END]
    words: list[str] = []
    start, at, last, collecting = 0, 0, len(text) - 1, None

    def push(end: int) -> None:
        if start < end:
            words.append(text[start:end])

    while at <= last:
        size = _contraction(text, at) if text[at] == "'" else 0
        if size:
            push(at)  # what is being collected stays the same, as in PowerInfer
            words.append(text[at : at + size])
            at = start = at + size
            continue
        if at == last:
            push(at + 1)
            break
        kind, following = kinds[at], kinds[at + 1]
        if collecting is None:
            alone = start == at and text[at] == " "
            collecting = _begins(kind, following, alone)
            ends = collecting is None
        else:
            ends = _ends(collecting, kind, following)
        if ends:
            push(at)
            start, collecting = at, None
        at += 1
    return words


def _contraction(text: str, at: int) -> int:
    """Return the length of 's 't 'm 'd 're 've 'll at this apostrophe, 0 if there is none."""
    if text[at + 1 : at + 2] in _SHORT:
        return 2
    return 3 if text[at + 1 : at + 3] in _LONG else 0


def _begins(kind: int, following: int, lone_space: bool) -> int | None:
    """Return what a word collects from here on, None for a single whitespace character."""
    if kind != _WHITESPACE:
        return kind
    if lone_space and following != _WHITESPACE:
        return _OTHER if following == _END else following
    return _WHITESPACE if following == _WHITESPACE else None


def _ends(collecting: int, kind: int, following: int) -> bool:
    if collecting == _WHITESPACE:
        return following in (_LETTER, _DIGIT)
    if collecting == _OTHER:
        return kind != _OTHER
    return kind != collecting
