"""A vocabulary as PowerInfer reads it: what its keys hold, and what would stop PowerInfer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from gguf import TokenType

from gguf_export.tokens.byte_level_encoder import BYTE_TOKENS

if TYPE_CHECKING:
    from gguf import GGUFWriter

PIECES = "llama"
"""`tokenizer.ggml.model` of SentencePiece vocabularies, whose pieces merge by score."""
BYTE_LEVEL = "gpt2"
"""`tokenizer.ggml.model` of byte-level BPE, which merges by rank."""
BYTE_PIECES = tuple(b"<0x%02X>" % byte for byte in range(256))
NONE = -1


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens in id order, as many as the embedding has rows.

    Attributes:
        kind: `PIECES` or `BYTE_LEVEL`.
        tokens: UTF-8 text of each token; byte-level ones in GPT-2's alphabet of bytes.
        types: `gguf.TokenType` of each.
        scores: SentencePiece score of each; empty for byte-level BPE.
        merges: `left right` by rank; empty for pieces.
        bos_id: begin-of-sequence id.
        eos_id: end-of-sequence id, or -1.
        unk_id: unknown id, or -1.
        pad_id: padding id, or -1.
        add_bos: whether the model's own tokenizer puts BOS before a text, None if it does not say.
            PowerInfer ignores it: it puts BOS before pieces and none before byte-level BPE.
        differences: why PowerInfer's ids of a text may differ from the model's own, a line each.
        warnings: what a user should know, the differences and their measured share included.
    """

    kind: str
    tokens: list[bytes]
    types: list[int]
    scores: list[float]
    merges: list[bytes]
    bos_id: int
    eos_id: int = NONE
    unk_id: int = NONE
    pad_id: int = NONE
    add_bos: bool | None = None
    differences: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The id of each token."""
        return {token: number for number, token in enumerate(self.tokens)}


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Add the tokenizer's keys (PowerInfer@d3ebd7c llama.cpp:llm_load_vocab)."""
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.bos_id)
    for number, add in (
        (vocabulary.eos_id, writer.add_eos_token_id),
        (vocabulary.unk_id, writer.add_unk_token_id),
        (vocabulary.pad_id, writer.add_pad_token_id),
    ):
        if number != NONE:
            add(number)
    if vocabulary.add_bos is not None:
        writer.add_add_bos_token(vocabulary.add_bos)


def lay_out(found: Mapping[int, tuple[bytes, int]], rows: int) -> tuple[list[bytes], list[int]]:
    """Return tokens and types of all rows; rows without a token get an unused one.

    Args:
        found: text and type by id.
        rows: rows of the embedding.
    """
    taken = {token for token, _ in found.values()}
    tokens, types = [], []
    for number in range(rows):
        token, kind = found.get(number, (f"<pad_{number}>".encode(), int(TokenType.UNUSED)))
        while number not in found and token in taken:
            token = b"<" + token + b">"
        tokens.append(token)
        types.append(kind)
    return tokens, types


def mark_control(types: list[int], *numbers: int | None) -> None:
    """Give special ids, where they are known, the type of control tokens, which print nothing."""
    for number in numbers:
        if number is not None and types[number] == TokenType.NORMAL:
            types[number] = int(TokenType.CONTROL)


def vocabulary_problems(vocabulary: Vocabulary) -> Iterator[str]:
    """Yield what would make PowerInfer stop, or read other texts than psp (same functions)."""
    count = len(vocabulary.tokens)
    if vocabulary.kind == PIECES and len(vocabulary.scores) != count:
        yield "tokens, scores and types differ in number"
    if len(vocabulary.types) != count or len(vocabulary.scores) not in (0, count):
        yield "tokens, scores and types differ in number"
    if len(vocabulary.ids) != count:
        twice = next(t for n, t in enumerate(vocabulary.tokens) if vocabulary.ids[t] != n)
        yield f"token {_shown(twice)} appears twice"
    if not 0 <= vocabulary.bos_id < count:
        yield f"bos_token_id {vocabulary.bos_id} is outside the vocabulary"
    for number, token in enumerate(vocabulary.tokens):
        if not token or b"\0" in token or not _is_utf8(token):
            yield f"token {number} ({_shown(token)}) is empty, holds a NUL or is no UTF-8"
    yield from (_piece_problems if vocabulary.kind == PIECES else _merge_problems)(vocabulary)


def _piece_problems(vocabulary: Vocabulary) -> Iterator[str]:
    for piece in BYTE_PIECES:
        if piece not in vocabulary.ids:
            yield f"byte piece {piece.decode()} is missing"
    known = set(BYTE_PIECES)
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind == TokenType.BYTE and token not in known:
            yield f"byte piece {_shown(token)} names no byte"


def _merge_problems(vocabulary: Vocabulary) -> Iterator[str]:
    for byte, character in enumerate(BYTE_TOKENS):
        if character.encode() not in vocabulary.ids:
            yield f"token {character!r} of byte {byte} is missing"
    alphabet = set("".join(BYTE_TOKENS))
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind == TokenType.NORMAL and not alphabet.issuperset(token.decode("utf-8", "replace")):
            yield f"token {_shown(token)} is of type NORMAL but is not spelt in GPT-2's bytes"
    if not vocabulary.merges:
        yield "there are no merges"
    for merge in vocabulary.merges:
        left, space, right = merge.partition(b" ")
        if not (space and left in vocabulary.ids and right in vocabulary.ids):
            yield f"merge {_shown(merge)} does not name two tokens"
        if left + right not in vocabulary.ids:
            yield f"merge {_shown(merge)} makes no token"


def _is_utf8(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def _shown(token: bytes) -> str:
    return repr(token[:80].decode("utf-8", "replace"))
