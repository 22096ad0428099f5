"""The tokenizer inside an exported file, with PowerInfer's own algorithm.

Source: PowerInfer@d3ebd7c llama.cpp:llm_tokenizer_spm, llama_tokenize_internal and
llama_token_to_piece. Pieces are merged pair by pair, the highest score first and the leftmost among
equals; what is no piece in the end becomes byte pieces.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from gguf import GGUFValueType, TokenType

from gguf_export.reader import GGUFFile

_SPACE = "\u2581".encode()
_UNKNOWN = "\u2585".encode()


class FileVocabulary:
    """Encodes and decodes text as PowerInfer does with the same file."""

    def __init__(self, file: GGUFFile) -> None:
        """Read the vocabulary.

        Raises:
            FormatError: tokenizer keys are missing, of other types or lengths, or of a kind other
                than SentencePiece.
        """
        kind = file.value("tokenizer.ggml.model", GGUFValueType.STRING)
        if kind != "llama":
            raise file.error(f"tokenizer {kind!r} is not supported, expected 'llama'")
        array = GGUFValueType.ARRAY
        self.tokens: list[bytes] = file.value("tokenizer.ggml.tokens", array, GGUFValueType.STRING)
        self.scores: list[float] = file.value(
            "tokenizer.ggml.scores", array, GGUFValueType.FLOAT32
        ).tolist()
        self.types: list[int] = file.value(
            "tokenizer.ggml.token_type", array, GGUFValueType.INT32
        ).tolist()
        self.bos_id: int = file.value("tokenizer.ggml.bos_token_id", GGUFValueType.UINT32)
        self._ids = {token: number for number, token in enumerate(self.tokens)}
        self._check(file)

    def _check(self, file: GGUFFile) -> None:
        if not len(self.tokens) == len(self.scores) == len(self.types):
            raise file.error("tokens, scores and types differ in number")
        if len(self._ids) != len(self.tokens):
            twice = next(t for n, t in enumerate(self.tokens) if self._ids[t] != n)
            raise file.error(f"token {twice.decode('utf-8', 'replace')!r} appears twice")
        if self.bos_id >= len(self.tokens):
            raise file.error(f"bos_token_id {self.bos_id} is outside the vocabulary")
        pieces = {_byte_piece(byte) for byte in range(256)}
        for piece in sorted(pieces - self._ids.keys()):
            raise file.error(f"byte piece {piece.decode()} is missing")
        for token, kind in zip(self.tokens, self.types, strict=True):
            if kind == TokenType.BYTE and token not in pieces:
                raise file.error(f"byte piece {token.decode('utf-8', 'replace')!r} names no byte")

    def encode(self, text: str, *, space_prefix: bool = True) -> list[int]:
        """Return the token ids of `text`, without BOS.

        Args:
            text: any text.
            space_prefix: put a space in front, as PowerInfer's `perplexity` does and its `main`
                does not (it parses special tokens, which turns the prefix off).
        """
        if not text:
            return []
        data = ((" " if space_prefix else "") + text).encode("utf-8", "surrogateescape")
        symbols = _characters(data.replace(b" ", _SPACE))
        ids: list[int] = []
        for symbol in self._merge(symbols):
            number = self._ids.get(symbol)
            if number is None:
                ids.extend(self._ids[_byte_piece(byte)] for byte in symbol)
            else:
                ids.append(number)
        return ids

    def _merge(self, symbols: list[bytes]) -> Iterable[bytes]:
        following = [*range(1, len(symbols)), -1]
        previous = list(range(-1, len(symbols) - 1))
        queue: list[tuple[float, int, int, bytes]] = []

        def offer(left: int, right: int) -> None:
            if left < 0 or right < 0:
                return
            joined = symbols[left] + symbols[right]
            number = self._ids.get(joined)
            if number is not None:
                heapq.heappush(queue, (-self.scores[number], left, right, joined))

        for left, right in enumerate(following):
            offer(left, right)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            # A merged-away symbol is empty; a grown one makes the joined length differ.
            if not symbols[left] or not symbols[right]:
                continue
            if len(symbols[left]) + len(symbols[right]) != len(joined):
                continue
            symbols[left], symbols[right] = joined, b""
            following[left] = following[right]
            if following[right] >= 0:
                previous[following[right]] = left
            offer(previous[left], left)
            offer(left, following[left])
        return (symbol for symbol in symbols if symbol)

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the text of token ids as bytes; control tokens give nothing."""
        return b"".join(self._piece(number) for number in ids)

    def _piece(self, number: int) -> bytes:
        kind, token = self.types[number], self.tokens[number]
        if kind == TokenType.NORMAL:
            return token.replace(_SPACE, b" ")
        if kind == TokenType.BYTE:
            return bytes([int(token[3:5], 16)])
        return _UNKNOWN if kind == TokenType.UNKNOWN else b""


def _byte_piece(byte: int) -> bytes:
    return b"<0x%02X>" % byte


def _characters(data: bytes) -> list[bytes]:
    """Split UTF-8 into characters by their leading bytes, as llama.cpp does."""
    lengths = (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4)
    characters, at = [], 0
    while at < len(data):
        size = lengths[data[at] >> 4]
        characters.append(data[at : at + size])
        at += size
    return characters
