"""What a checkpoint's files say around its tokenizer: added tokens and special ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from common.errors import FETCH_AGAIN, CheckpointError
from common.files import read_json
from gguf_export.tokens.vocabulary import NONE, Vocabulary

_REPLACEABLE = (TokenType.CONTROL, TokenType.UNUSED, TokenType.UNKNOWN)


@dataclass(frozen=True)
class AddedToken:
    """A token that the tokenizer matches as a whole before anything else.

    Attributes:
        content: its text.
        special: whether it controls (`<|im_end|>`) rather than stands for its text.
    """

    content: str
    special: bool

    @property
    def type(self) -> int:
        """Its `gguf.TokenType`, as PowerInfer's converter for byte-level models chooses it."""
        return int(TokenType.CONTROL if self.special else TokenType.USER_DEFINED)


class TokenizerFiles:
    """The settings around a checkpoint's tokenizer."""

    def __init__(self, path: Path, config: Mapping[str, object]) -> None:
        """Read those that are there.

        Raises:
            CheckpointError: one is damaged.
        """
        self._path, self._config = path, config
        self.settings = self._read("tokenizer_config.json")
        self._map = self._read("special_tokens_map.json")
        self._json = self._read("tokenizer.json")
        self.added = self._added()

    def _read(self, name: str) -> dict[str, object]:
        file = self._path / name
        return read_json(file, CheckpointError, FETCH_AGAIN) if file.is_file() else {}

    def _added(self) -> dict[int, AddedToken]:
        """Return added tokens by id; what any file calls special is.

        Raises:
            CheckpointError: files that contradict each other, or entries of another form.
        """
        special = {text for source in (self.settings, self._map) for text in _special_texts(source)}
        found: dict[int, AddedToken] = {}
        for name, number, content, flag in self._entries():
            if not _is_id(number) or not isinstance(content, str) or not content:
                raise CheckpointError(
                    f"{self._path / name}: added token {content!r} with id {number!r} is no text "
                    "with a number",
                    FETCH_AGAIN,
                )
            before = found.get(number, AddedToken(content, False))
            if before.content != content:
                raise CheckpointError(
                    f"{self._path / name}: id {number} is {content!r} here and {before.content!r} "
                    "in another tokenizer file",
                    "keep the model's own files only",
                )
            is_special = before.special or flag is True or content in special
            found[number] = AddedToken(content, is_special)
        return found

    def _entries(self) -> Iterator[tuple[str, Any, Any, Any]]:
        """Yield file, id, text and whether special of each entry."""
        for content, number in self._read("added_tokens.json").items():
            yield "added_tokens.json", number, content, False
        decoder = self.settings.get("added_tokens_decoder")
        for key, token in decoder.items() if isinstance(decoder, dict) else ():
            number = int(key) if key.isdecimal() and len(key) < 10 else key
            yield "tokenizer_config.json", number, _content(token), _flag(token)
        tokens = self._json.get("added_tokens")
        for token in tokens if isinstance(tokens, list) else ():
            number = token.get("id") if isinstance(token, dict) else token
            yield "tokenizer.json", number, _content(token), _flag(token)

    def special_id(self, kind: str, ids: Mapping[bytes, int], default: int = NONE) -> int:
        """Return the id of `eos`, `unk` or `pad`.

        The order is that of PowerInfer's converters (gguf-py/gguf/vocab.py:SpecialVocab): the token
        that tokenizer_config.json names, if tokenizer.json adds it; then config.json's number, of
        several the first (theirs ignore a list). Last comes a token that is merely named.

        Args:
            kind: which.
            ids: id of each token of the vocabulary.
            default: what it is if no file tells.
        """
        text = _content(self.settings.get(f"{kind}_token"))
        if text is not None and text in self._json_texts():
            found = next(n for n, token in self.added.items() if token.content == text)
            if found < len(ids):
                return found
        number = self._config.get(f"{kind}_token_id")
        if isinstance(number, list) and number:
            number = number[0]
        if isinstance(number, int) and _is_id(number) and number < len(ids):
            return number
        return default if text is None else ids.get(text.encode("utf-8", "replace"), default)

    @property
    def add_bos(self) -> bool | None:
        """Whether tokenizer_config.json wants BOS before a text, None if it does not say."""
        value = self.settings.get("add_bos_token")
        return value if isinstance(value, bool) else None

    def _json_texts(self) -> set[str | None]:
        tokens = self._json.get("added_tokens")
        return {_content(token) for token in tokens} if isinstance(tokens, list) else set()


def _is_id(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _content(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _flag(token: object) -> bool:
    return isinstance(token, dict) and token.get("special") is True


def _special_texts(source: Mapping[str, object]) -> Iterator[str]:
    """Yield the special tokens that a settings file names."""
    for key, value in source.items():
        if key.endswith("_token") or key in ("additional_special_tokens", "extra_special_tokens"):
            for token in value if isinstance(value, list) else [value]:
                text = _content(token)
                if text:
                    yield text


def lay_out(
    file: Path,
    files: TokenizerFiles,
    found: dict[int, tuple[bytes, int]],
    rows: int,
    *,
    kind: str,
    bos_id: int,
    eos_id: int = NONE,
    unk_id: int = NONE,
    add_bos: bool | None,
) -> Vocabulary:
    """Return a vocabulary of all rows with added tokens and special ids, but no scores or merges.

    Args:
        file: the tokenizer's own file, for messages.
        files: the settings around it.
        found: text and type by id, without added tokens.
        rows: rows of the embedding; those without a token get an unused one.
        kind: the vocabulary's.
        bos_id: begin-of-sequence id.
        eos_id: the tokenizer's own end-of-sequence id, used where no setting names another.
        unk_id: its unknown id, likewise.
        add_bos: whether it puts BOS before a text.

    Raises:
        CheckpointError: an added token in the place of an ordinary one.
    """
    warnings = _place_added(file, files.added, found, rows)
    taken = {token for token, _ in found.values()}
    tokens, types = [], []
    for number in range(rows):
        token, token_type = found.get(number, (f"<pad_{number}>".encode(), int(TokenType.UNUSED)))
        while number not in found and token in taken:
            token = b"<" + token + b">"
        tokens.append(token)
        types.append(token_type)
    ids = {token: number for number, token in enumerate(tokens)}
    return Vocabulary(
        kind=kind,
        tokens=tokens,
        types=types,
        bos_id=bos_id,
        eos_id=files.special_id("eos", ids, eos_id),
        unk_id=files.special_id("unk", ids, unk_id),
        pad_id=files.special_id("pad", ids),
        add_bos=add_bos,
        warnings=tuple(warnings),
    )


def _place_added(
    file: Path, added: Mapping[int, AddedToken], found: dict[int, tuple[bytes, int]], rows: int
) -> list[str]:
    """Put added tokens at their ids among `found`, text and type by id.

    Returns:
        A warning for each that has no row.

    Raises:
        CheckpointError: one whose id belongs to an ordinary token of another text.
    """
    warnings: list[str] = []
    for number, token in sorted(added.items()):
        if number >= rows:
            warnings.append(f"token {token.content!r} has id {number}, beyond the model's rows")
            continue
        text = token.content.encode("utf-8", "replace")
        held, kind = found.get(number, (text, int(TokenType.NORMAL)))
        if held != text and kind not in _REPLACEABLE:
            raise CheckpointError(
                f"{file}: id {number} is token {held.decode('utf-8', 'replace')!r}, an added token "
                f"calls it {token.content!r}",
                "use the model's own tokenizer files",
            )
        if held != text or kind in (TokenType.NORMAL, TokenType.USER_DEFINED):
            found[number] = text, token.type
    return warnings
