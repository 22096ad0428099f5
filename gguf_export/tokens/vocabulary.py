"""A vocabulary as PowerInfer has it: its keys, what would stop PowerInfer, texts to ids and back.

llama.cpp of today finds pieces in texts as PowerInfer does, but minds keys that PowerInfer does not
read. Source: PowerInfer@d3ebd7c llama.cpp:llm_load_vocab, llama_tokenize_internal and
llama_token_to_piece; llama.cpp@0c1e570 src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from gguf import GGUFValueType, TokenType

from common.errors import DataError
from gguf_export.tokens.encoders import (
    BYTE_TOKENS,
    SPACE,
    ByteLevelEncoder,
    PieceEncoder,
    characters,
)
from gguf_files.reader import GGUFFile

if TYPE_CHECKING:
    from gguf import GGUFWriter

PIECES = "llama"
"""`tokenizer.ggml.model` of SentencePiece vocabularies, whose pieces merge by score."""
BYTE_LEVEL = "gpt2"
"""`tokenizer.ggml.model` of byte-level BPE, which merges by rank."""
BYTE_PIECES = {b"<0x%02X>" % byte: byte for byte in range(256)}
"""The byte of each piece that stands for one."""
POWERINFER, SECOND_ENGINE, LLAMA_CPP = "PowerInfer", "PowerInfer's second engine", "llama.cpp"
"""Whose ids a vocabulary's are, as messages call it."""
ADD_BOS_KEY, SPACE_KEY = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"
"""Whether BOS and a space go before a text; PowerInfer's first engine reads neither."""
DEFAULT_BOS = {PIECES: 1, BYTE_LEVEL: 11}
"""Begin-of-sequence ids of files without the key (PowerInfer@d3ebd7c llama.cpp:llm_load_vocab)."""
ORDINARY_BYTES = frozenset(
    (*b"\t\n\r", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1), 0xF3)
)
"""Bytes that texts are made of. The others are control characters, occur in no UTF-8, or lead
planes without characters (F1, F2) or of private ones (F4). PowerInfer reads files without tokens of
these, and stops at a text that holds one."""
NONE = -1

_UNKNOWN = "\u2585".encode()
_BYTE_NAMES = {character.encode(): byte for byte, character in enumerate(BYTE_TOKENS)}
_BYTES = {character: bytes([byte]) for byte, character in enumerate(BYTE_TOKENS)}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens in id order, as many as the embedding has rows.

    Attributes:
        kind: `PIECES` or `BYTE_LEVEL`.
        tokens: UTF-8 text of each token; byte-level ones in GPT-2's alphabet of bytes.
        types: `gguf.TokenType` of each.
        bos_id: begin-of-sequence id.
        scores: SentencePiece score of each; empty for byte-level BPE.
        merges: `left right` by rank; empty for pieces.
        eos_id: end-of-sequence id, or -1.
        unk_id: unknown id, or -1.
        pad_id: padding id, or -1.
        add_bos: whether the model's own tokenizer puts BOS before a text, None if it does not say.
            PowerInfer ignores it: it puts BOS before pieces and none before byte-level BPE.
        space_prefix: whether the model's own tokenizer puts a space before a text of pieces.
            PowerInfer ignores it: it puts one there.
        engine: whose ids these are. All but `POWERINFER` do as `space_prefix` says.
        differences: why the engine's ids of a text may differ from the model's own, a line each.
        notes: what a user should know of the model's own ids.
        warnings: what a user should know of the engine's, the differences and their measured share
            included.
    """

    kind: str
    tokens: list[bytes]
    types: list[int]
    bos_id: int
    scores: list[float] = field(default_factory=list)
    merges: list[bytes] = field(default_factory=list)
    eos_id: int = NONE
    unk_id: int = NONE
    pad_id: int = NONE
    add_bos: bool | None = None
    space_prefix: bool = True
    engine: str = POWERINFER
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The id of each token."""
        return {token: number for number, token in enumerate(self.tokens)}

    @cached_property
    def encoder(self) -> PieceEncoder | ByteLevelEncoder:
        """PowerInfer's way of finding them in texts."""
        if self.kind == BYTE_LEVEL:
            return ByteLevelEncoder(self.ids, self.merges)
        return PieceEncoder(self.ids, self.scores)

    def mark_control(self) -> None:
        """Give BOS, EOS and padding the type of control tokens, which print nothing."""
        ordinary = (TokenType.NORMAL, TokenType.USER_DEFINED)
        for number in (self.bos_id, self.eos_id, self.pad_id):
            if number != NONE and self.types[number] in ordinary:
                self.types[number] = int(TokenType.CONTROL)

    @property
    def bos(self) -> int | None:
        """The id that the engine puts before texts, None if it puts none.

        PowerInfer puts BOS before pieces, whatever the keys say; others do as a file's key says.
        """
        told = None if self.engine == POWERINFER else self.add_bos
        return self.bos_id if (self.kind == PIECES if told is None else told) else None

    @property
    def _begin(self) -> list[int]:
        return [] if self.bos is None else [self.bos]

    def text_ids(self, text: str) -> list[int]:
        """Return the ids that PowerInfer's `perplexity` makes of a text, BOS included."""
        return [*self._begin, *self.encode(text)]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the ids that PowerInfer's `main` makes of a prompt, BOS included.

        Texts of special tokens become these tokens. Where several begin at the same place the
        longest counts here, in PowerInfer the first of a hash table.
        """
        ids = [*self._begin]
        for part in self._partition(_to_bytes(prompt)):
            ids += [part] if isinstance(part, int) else self._encode(part)
        return ids or [self.bos_id]

    def encode(self, text: str, *, space_prefix: bool = True) -> list[int]:
        """Return the token ids of `text`, without BOS.

        Args:
            text: any text.
            space_prefix: put a space in front of pieces if the engine does. PowerInfer's
                `perplexity` does and its `main` does not (it parses special tokens, which turns the
                prefix off).

        Raises:
            DataError: a text that is no UTF-8, at which PowerInfer stops with byte-level tokens.
        """
        if not text:
            return []
        begun = self.kind == PIECES and (self.space_prefix or self.engine == POWERINFER)
        return self._encode(_to_bytes(" " * (space_prefix and begun) + text))

    @cached_property
    def absent_bytes(self) -> frozenset[int]:
        """Bytes that no token stands for."""
        names = BYTE_PIECES if self.kind == PIECES else _BYTE_NAMES
        return frozenset(byte for name, byte in names.items() if name not in self.ids)

    def without_absent(self, text: str) -> str:
        """Return a text without the characters at which PowerInfer stops for want of a token."""
        if not self.absent_bytes:
            return text
        return "".join(c for c in text if self.absent_bytes.isdisjoint(_to_bytes(c)))

    def _encode(self, data: bytes) -> list[int]:
        encoder = self.encoder
        if isinstance(encoder, PieceEncoder):
            return encoder.encode(data)
        try:
            return encoder.encode(data.decode())
        except UnicodeDecodeError as error:
            raise DataError(
                f"the text is no UTF-8 ({error.reason}), at which PowerInfer stops with this "
                "model's tokenizer",
                "convert it",
            ) from error

    @cached_property
    def special_tokens(self) -> dict[bytes, int]:
        """Tokens that `main` finds whole in prompts: those that no two other tokens make up.

        Their types do not matter (llm_load_vocab, special_tokens_cache).
        """
        ids, sizes = self.ids, set(map(len, self.tokens))

        def whole(token: bytes) -> bool:
            parts = characters(token)
            return len(parts) > 1 and not any(
                at in sizes and len(token) - at in sizes and token[:at] in ids and token[at:] in ids
                for at in accumulate(map(len, parts[:-1]))
            )

        return {token: number for token, number in ids.items() if whole(token)}

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
            return bytes([BYTE_PIECES[token]])
        return _UNKNOWN if kind == TokenType.UNKNOWN else b""


def _to_bytes(text: str) -> bytes:
    """Return a text's bytes; bytes that are no UTF-8 come as Python's surrogate escapes."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise DataError("the text holds half of a surrogate pair", "mend its encoding") from error


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
    if not vocabulary.space_prefix:
        writer.add_add_space_prefix(False)


def read_file_vocabulary(file: GGUFFile, engine: str = POWERINFER) -> Vocabulary:
    """Read the keys back.

    Args:
        file: the file.
        engine: whose ids these are to be.

    Raises:
        FormatError: they are missing, of other types or lengths, or of another kind, or PowerInfer
            would stop at them.
    """
    kind = file.value("tokenizer.ggml.model", GGUFValueType.STRING)
    if kind not in (PIECES, BYTE_LEVEL):
        raise file.error(
            f"tokenizer {kind!r} is not supported, expected {PIECES!r} or {BYTE_LEVEL!r}"
        )

    def array(name: str, element: GGUFValueType) -> Any:
        return file.value(f"tokenizer.ggml.{name}", GGUFValueType.ARRAY, element)

    def number(name: str, default: int = NONE) -> Any:
        return file.optional(f"tokenizer.ggml.{name}_token_id", GGUFValueType.UINT32, default)

    def flag(key: str, default: bool | None) -> Any:
        read = engine != POWERINFER
        return file.optional(key, GGUFValueType.BOOL, default) if read else default

    tokens = array("tokens", GGUFValueType.STRING)
    merges = array("merges", GGUFValueType.STRING) if kind == BYTE_LEVEL else []
    scores = array("scores", GGUFValueType.FLOAT32).tolist() if kind == PIECES else []
    vocabulary = Vocabulary(
        kind=kind,
        tokens=tokens,
        types=array("token_type", GGUFValueType.INT32).tolist(),
        scores=scores,
        merges=merges,
        bos_id=number("bos", DEFAULT_BOS[kind]),
        eos_id=number("eos"),
        unk_id=number("unknown"),
        pad_id=number("padding"),
        add_bos=flag(ADD_BOS_KEY, None),
        space_prefix=kind != PIECES or flag(SPACE_KEY, True),
        engine=engine,
    )
    problem = next(vocabulary_problems(vocabulary), None)
    if problem is not None:
        raise file.error(problem)
    return vocabulary


def vocabulary_problems(vocabulary: Vocabulary) -> Iterator[str]:
    """Yield what would make PowerInfer stop, or read other texts than psp (same functions)."""
    count = len(vocabulary.tokens)
    scores = (count,) if vocabulary.kind == PIECES else (0, count)
    if len(vocabulary.types) != count or len(vocabulary.scores) not in scores:
        yield "tokens, scores and types differ in number"
    if len(vocabulary.ids) != count:
        twice = next(t for n, t in enumerate(vocabulary.tokens) if vocabulary.ids[t] != n)
        yield f"token {_shown(twice)} appears twice"
    if not 0 <= vocabulary.bos_id < count:
        yield f"bos_token_id {vocabulary.bos_id} is outside the vocabulary"
    for number, token in enumerate(vocabulary.tokens):
        if not token or b"\0" in token or token.decode("utf-8", "ignore").encode() != token:
            yield f"token {number} ({_shown(token)}) is empty, holds a NUL or is no UTF-8"
    yield from (_piece_problems if vocabulary.kind == PIECES else _merge_problems)(vocabulary)


def _piece_problems(vocabulary: Vocabulary) -> Iterator[str]:
    for piece in BYTE_PIECES:
        if piece not in vocabulary.ids:
            yield f"byte piece {piece.decode()} is missing"
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind == TokenType.BYTE and token not in BYTE_PIECES:
            yield f"byte piece {_shown(token)} names no byte"


def _merge_problems(vocabulary: Vocabulary) -> Iterator[str]:
    for byte in sorted(vocabulary.absent_bytes & ORDINARY_BYTES):
        yield f"token {BYTE_TOKENS[byte]!r} of byte {byte} is missing"
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


def _shown(token: bytes) -> str:
    return repr(token[:80].decode("utf-8", "replace"))
