"""A SentencePiece model as GGUF tokenizer keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gguf import TokenType

if TYPE_CHECKING:
    import sentencepiece


@dataclass(frozen=True)
class Vocabulary:
    """Pieces in id order, as many as the embedding has rows.

    Attributes:
        tokens: UTF-8 text of each piece.
        scores: SentencePiece score of each.
        types: `gguf.TokenType` of each.
        bos_id: begin-of-sequence id.
        eos_id: end-of-sequence id, or -1.
        unk_id: unknown id.
    """

    tokens: list[bytes]
    scores: list[float]
    types: list[int]
    bos_id: int
    eos_id: int
    unk_id: int


def read_vocabulary(tokenizer: sentencepiece.SentencePieceProcessor, vocab_size: int) -> Vocabulary:
    """Turn a tokenizer into GGUF's lists, padded to `vocab_size` with unused pieces.

    `vocab_size` is at least the number of pieces.
    """
    size = tokenizer.vocab_size()
    padding = [f"<pad_{number}>".encode() for number in range(size, vocab_size)]
    types = [_type(tokenizer, number) for number in range(size)]
    return Vocabulary(
        tokens=[tokenizer.id_to_piece(number).encode() for number in range(size)] + padding,
        scores=[tokenizer.get_score(number) for number in range(size)] + [-1000.0] * len(padding),
        types=types + [int(TokenType.UNUSED)] * len(padding),
        bos_id=tokenizer.bos_id(),
        eos_id=tokenizer.eos_id(),
        unk_id=tokenizer.unk_id(),
    )


def _type(tokenizer: sentencepiece.SentencePieceProcessor, number: int) -> int:
    if tokenizer.is_unknown(number):
        return int(TokenType.UNKNOWN)
    if tokenizer.is_control(number):
        return int(TokenType.CONTROL)
    if tokenizer.is_byte(number):
        return int(TokenType.BYTE)
    if tokenizer.is_unused(number):
        return int(TokenType.UNUSED)
    return int(TokenType.NORMAL)
