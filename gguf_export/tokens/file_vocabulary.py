"""The tokenizer inside an exported file, with PowerInfer's own algorithm.

Source: PowerInfer@d3ebd7c llama.cpp:llm_load_vocab, llama_tokenize_internal and
llama_token_to_piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import accumulate
from typing import Any

from gguf import GGUFValueType, TokenType

from common.errors import DataError
from gguf_export.pwri.reader import GGUFFile
from gguf_export.tokens.byte_level_encoder import BYTE_TOKENS, ByteLevelEncoder
from gguf_export.tokens.piece_encoder import SPACE, PieceEncoder, characters
from gguf_export.tokens.vocabulary import BYTE_LEVEL, NONE, PIECES, Vocabulary, vocabulary_problems

_UNKNOWN = "\u2585".encode()
_BYTES = {character: bytes([byte]) for byte, character in enumerate(BYTE_TOKENS)}


class FileVocabulary:
    """Encodes and decodes text as PowerInfer does with the same file."""

    def __init__(self, file: GGUFFile) -> None:
        """Read the vocabulary.

        Raises:
            FormatError: tokenizer keys are missing, of other types or lengths, or of another kind,
                or PowerInfer would stop at them.
        """
        self.vocabulary = _read(file)
        problem = next(vocabulary_problems(self.vocabulary), None)
        if problem is not None:
            raise file.error(problem)
        self.tokens, self.types = self.vocabulary.tokens, self.vocabulary.types
        self.scores, self.bos_id = self.vocabulary.scores, self.vocabulary.bos_id
        self.kind = self.vocabulary.kind

    @property
    def add_bos(self) -> bool:
        """Whether PowerInfer puts BOS before texts: it does for pieces, whatever the keys say."""
        return self.kind == PIECES

    def text_ids(self, text: str) -> list[int]:
        """Return the ids that PowerInfer's `perplexity` makes of a text, BOS included."""
        return [self.bos_id] * self.add_bos + self.encode(text)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the ids that PowerInfer's `main` makes of a prompt, BOS included.

        Texts of special tokens become these tokens. Where several begin at the same place the
        longest counts here, in PowerInfer the first of a hash table.
        """
        ids = [self.bos_id] * self.add_bos
        for part in self._partition(_to_bytes(prompt)):
            ids += [part] if isinstance(part, int) else self._encode(part)
        return ids or [self.bos_id]

    def encode(self, text: str, *, space_prefix: bool = True) -> list[int]:
        """Return the token ids of `text`, without BOS.

        Args:
            text: any text.
            space_prefix: put a space in front, as PowerInfer's `perplexity` does for pieces and its
                `main` does not (it parses special tokens, which turns the prefix off).

        Raises:
            DataError: a text that is no UTF-8, at which PowerInfer stops with byte-level tokens.
        """
        if not text:
            return []
        return self._encode(_to_bytes(" " * (space_prefix and self.add_bos) + text))

    def _encode(self, data: bytes) -> list[int]:
        if isinstance(self._encoder, PieceEncoder):
            return self._encoder.encode(data)
        try:
            return self._encoder.encode(data.decode())
        except UnicodeDecodeError as error:
            raise DataError(
                f"the text is no UTF-8 ({error.reason}), at which PowerInfer stops with this "
                "model's tokenizer",
                "convert it",
            ) from error

    @cached_property
    def _encoder(self) -> PieceEncoder | ByteLevelEncoder:
        vocabulary = self.vocabulary
        if self.kind == BYTE_LEVEL:
            return ByteLevelEncoder(vocabulary.ids, vocabulary.merges)
        return PieceEncoder(vocabulary.ids, vocabulary.scores)

    @cached_property
    def special_tokens(self) -> dict[bytes, int]:
        """Tokens that `main` finds whole in prompts: those that no two other tokens make up.

        Their types do not matter (llm_load_vocab, special_tokens_cache).
        """
        return {
            token: number for token, number in self.vocabulary.ids.items() if self._whole(token)
        }

    def _whole(self, token: bytes) -> bool:
        parts, ids, sizes = characters(token), self.vocabulary.ids, self._sizes
        return len(parts) > 1 and not any(
            at in sizes and len(token) - at in sizes and token[:at] in ids and token[at:] in ids
            for at in accumulate(map(len, parts[:-1]))
        )

    @cached_property
    def _sizes(self) -> set[int]:
        return set(map(len, self.tokens))

    def _partition(self, data: bytes) -> Iterator[bytes | int]:
        """Cut a prompt at special tokens."""
        sizes = {len(token) for token in self.special_tokens if len(token) <= len(data)}
        start = at = 0
        while at < len(data):
            pieces = (data[at : at + size] for size in sorted(sizes, reverse=True))
            found = next((piece for piece in pieces if piece in self.special_tokens), None)
            if found is None:
                at += 1
                continue
            if start < at:
                yield data[start:at]
            yield self.special_tokens[found]
            start = at = at + len(found)
        if start < len(data):
            yield data[start:]

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the text of token ids as bytes; control tokens give nothing."""
        return b"".join(self._piece(number) for number in ids)

    def _piece(self, number: int) -> bytes:
        kind, token = self.types[number], self.tokens[number]
        if self.kind == BYTE_LEVEL:
            spelt = token.decode() if kind == TokenType.NORMAL else ""
            return b"".join(_BYTES[character] for character in spelt)
        if kind == TokenType.NORMAL:
            return token.replace(SPACE, b" ")
        if kind == TokenType.BYTE:
            return bytes([int(token[3:5], 16)])
        return _UNKNOWN if kind == TokenType.UNKNOWN else b""


def _to_bytes(text: str) -> bytes:
    """Return a text's bytes; bytes that are no UTF-8 come as Python's surrogate escapes."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise DataError("the text holds half of a surrogate pair", "mend its encoding") from error


def _read(file: GGUFFile) -> Vocabulary:
    kind = file.value("tokenizer.ggml.model", GGUFValueType.STRING)
    if kind not in (PIECES, BYTE_LEVEL):
        raise file.error(
            f"tokenizer {kind!r} is not supported, expected {PIECES!r} or {BYTE_LEVEL!r}"
        )

    def array(name: str, element: GGUFValueType) -> Any:
        return file.value(f"tokenizer.ggml.{name}", GGUFValueType.ARRAY, element)

    def number(name: str) -> int:
        key = f"tokenizer.ggml.{name}_token_id"
        return file.value(key, GGUFValueType.UINT32) if key in file.values else NONE

    tokens = array("tokens", GGUFValueType.STRING)
    merges = array("merges", GGUFValueType.STRING) if kind == BYTE_LEVEL else []
    scores = array("scores", GGUFValueType.FLOAT32).tolist() if kind == PIECES else []
    return Vocabulary(
        kind=kind,
        tokens=tokens,
        types=array("token_type", GGUFValueType.INT32).tolist(),
        scores=scores,
        merges=merges,
        bos_id=file.value("tokenizer.ggml.bos_token_id", GGUFValueType.UINT32),
        eos_id=number("eos"),
        unk_id=number("unknown"),
        pad_id=number("padding"),
    )
