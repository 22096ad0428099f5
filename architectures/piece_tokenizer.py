"""SentencePiece's tokenizer.model, with the tokens that other files add to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from architectures.tokenizer_files import OpenedTokenizer
from common.errors import FETCH_AGAIN, CheckpointError
from common.files import read_whole

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

_NO_PREFIX = b"\x1a\x02\x18\x00"
"""Appended to a ModelProto it turns normalizer_spec.add_dummy_prefix off: of two values of a field
protobuf takes the last (sentencepiece_model.proto)."""


@dataclass(frozen=True, kw_only=True)
class PieceTokenizer(OpenedTokenizer):
    """SentencePiece's own, which finds added tokens first.

    The model's own pieces that control (`</s>`) are found in no text, as in SentencePiece and
    PowerInfer's `perplexity`. A text gets a space in front; what follows an added token does only
    with `legacy: true` in tokenizer_config.json, as in transformers.

    Attributes:
        model: SentencePiece's object.
    """

    model: sentencepiece.SentencePieceProcessor

    @property
    def byte_level(self) -> bool:
        """Pieces are spelt in text, before which PowerInfer puts BOS."""
        return False

    @property
    def source(self) -> str:
        """Whose ids these are."""
        return f"those of {self.file.name}, by sentencepiece"

    @property
    def bos_text(self) -> str:
        """How the begin-of-sequence token is written."""
        if self.bos < self.model.vocab_size():
            return str(self.model.id_to_piece(self.bos))
        return self.files.added[self.bos].content

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a text."""
        own = self.model.eos_id()
        return self.files.end_ids | ({own} if own >= 0 else frozenset())

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without begin- and end-of-sequence tokens."""
        if not self._added:
            ids: list[int] = self.model.encode(text)
            return ids
        found: list[int] = []
        for at, part in self._parts(text):
            if isinstance(part, int):
                found.append(part)
            else:
                found += (self._later if at else self.model).encode(part)
        return found

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids; pieces that control give nothing."""
        texts: dict[int | None, str] = {number: text for text, number in self._added.items()}
        parts: list[str] = []
        run: list[int] = []
        for number in [*ids, None]:
            if number is None or number in texts:
                parts.append((self._later if parts else self.model).decode(run))
                parts.append(texts.get(number, ""))
                run = []
            elif number < self.model.vocab_size():
                run.append(number)
        return "".join(parts)

    @cached_property
    def _added(self) -> Mapping[str, int]:
        """Ids of tokens that are not the model's own pieces."""
        own = self.model.vocab_size()
        return {
            token.content: number
            for number, token in self.files.added.items()
            if number >= own or self.model.id_to_piece(number) != token.content
        }

    @cached_property
    def _later(self) -> sentencepiece.SentencePieceProcessor:
        """What encodes the text behind an added token."""
        if self.files.settings.get("legacy") is True:
            return self.model
        return _processor(self.model.serialized_model_proto() + _NO_PREFIX)

    @cached_property
    def _splitter(self) -> tokenizers.Tokenizer:
        """A tokenizer that knows added tokens alone: all between two of them is one unknown."""
        import tokenizers

        splitter = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
        splitter.add_tokens(
            [
                tokenizers.AddedToken(
                    token.content,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    single_word=token.single_word,
                    normalized=False,
                )
                for token in self.files.added.values()
                if token.content in self._added
            ]
        )
        return splitter

    def _parts(self, text: str) -> Iterator[tuple[int, str | int]]:
        """Cut a text at added tokens; yield where each part begins, and its text or id."""
        found = self._splitter.encode(text, add_special_tokens=False)
        for number, (start, end) in zip(found.ids, found.offsets, strict=True):
            token = self._splitter.id_to_token(number)
            yield start, self._added[token] if token else text[start:end]


def open_pieces(file: Path) -> sentencepiece.SentencePieceProcessor:
    """Open a tokenizer.model.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if not file.is_file():
        raise CheckpointError(
            f"{file}: not found", "psp needs the model's SentencePiece tokenizer.model"
        )
    problem = CheckpointError(f"{file}: not a SentencePiece model", FETCH_AGAIN)
    try:
        data = read_whole(file, CheckpointError, FETCH_AGAIN)
        if not data:
            raise problem
        return _processor(data)
    except (RuntimeError, ValueError) as error:  # a piece of other bytes than UTF-8
        raise problem from error


def _processor(proto: bytes) -> sentencepiece.SentencePieceProcessor:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=proto)
