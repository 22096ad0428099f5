"""A vocabulary from tokenizer.model, SentencePiece's own file, and the tokens added to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import TokenType

from common.errors import ExportError
from gguf_export.tokens.tokenizer_files import TokenizerFiles, lay_out
from gguf_export.tokens.vocabulary import PIECES, Vocabulary

if TYPE_CHECKING:
    import sentencepiece

_PADDING_SCORE = -1000.0
_BPE, _USER_DEFINED = 2, 4


def read_sentencepiece(
    file: Path,
    tokenizer: sentencepiece.SentencePieceProcessor,
    files: TokenizerFiles,
    vocab_size: int,
) -> Vocabulary:
    """Turn a SentencePiece model into PowerInfer's lists.

    Types are those of PowerInfer@d3ebd7c convert.py:SentencePieceVocab.

    Args:
        file: tokenizer.model, for messages.
        tokenizer: it, loaded.
        files: the settings around it.
        vocab_size: rows of the embedding, at least as many as there are pieces.

    Raises:
        ExportError: a model that does not merge pairs.
        CheckpointError: an added token in the place of a piece.
    """
    traits = _Traits.of(tokenizer.serialized_model_proto())
    if traits.model_type != _BPE:
        raise ExportError(
            f"{file}: is no BPE model, the only kind whose pieces PowerInfer finds",
            "use a model with a BPE tokenizer",
        )
    size = tokenizer.vocab_size()
    found = {
        number: (tokenizer.id_to_piece(number).encode(), _type(tokenizer, number))
        for number in range(size)
    }
    vocabulary = lay_out(
        file,
        files,
        found,
        vocab_size,
        kind=PIECES,
        bos_id=tokenizer.bos_id(),
        eos_id=tokenizer.eos_id(),
        unk_id=tokenizer.unk_id(),
        add_bos=files.add_bos,
    )
    scores = [tokenizer.get_score(number) for number in range(size)]
    scores += [_PADDING_SCORE] * (vocab_size - size)
    return replace(vocabulary, scores=scores, differences=tuple(traits.differences()))


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


@dataclass(frozen=True, kw_only=True)
class _Traits:
    """What makes SentencePiece's ids differ from PowerInfer's (sentencepiece_model.proto)."""

    model_type: int
    normaliser: str
    normalises: bool
    prefix: bool
    squeezes: bool
    user_defined: int

    @classmethod
    def of(cls, proto: bytes) -> _Traits:
        sections: dict[int, dict[int, Any]] = {2: {}, 3: {}}
        kinds: Counter[object] = Counter()
        for number, value in _fields(proto):
            if number == 1:
                kinds[dict(_fields(value)).get(3, 1)] += 1
            elif number in sections:
                sections[number] = dict(_fields(value))
        trainer, normaliser = sections[2], sections[3]
        return cls(
            model_type=trainer.get(3, 1),
            normaliser=bytes(normaliser.get(1, b"")).decode("utf-8", "replace"),
            normalises=bool(normaliser.get(2, b"")),
            prefix=bool(normaliser.get(3, 1)),
            squeezes=bool(normaliser.get(4, 1)),
            user_defined=kinds[_USER_DEFINED],
        )

    def differences(self) -> Iterator[str]:
        if self.normalises:
            yield f"tokenizer.model normalises text ({self.normaliser}), PowerInfer does not"
        if not self.prefix:
            yield "tokenizer.model puts no space before a text, PowerInfer does"
        if self.squeezes:
            yield "tokenizer.model drops repeated spaces, PowerInfer keeps them"
        if self.user_defined:
            yield (
                f"tokenizer.model matches {self.user_defined} user-defined pieces whole, "
                "PowerInfer merges them from characters or not at all"
            )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of the fields of a message in protobuf's wire format.

    SentencePiece has parsed the same bytes, so they are well-formed.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        size, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
