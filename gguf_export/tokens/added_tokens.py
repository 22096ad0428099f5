"""Added tokens and special ids, which a checkpoint spreads over several files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from common.errors import FETCH_AGAIN, CheckpointError
from common.files import read_json


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

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        """Read those that are there.

        Raises:
            CheckpointError: one is damaged.
        """
        self._path, self._config = path, config
        self.settings = self._read("tokenizer_config.json")
        self._map = self._read("special_tokens_map.json")
        self._json = self._read("tokenizer.json")
        self.added = self._added()

    def _read(self, name: str) -> dict[str, Any]:
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

    def special_id(self, kind: str, ids: Mapping[bytes, int]) -> int | None:
        """Return the id of `eos`, `unk` or `pad`, None if no file tells.

        The order is that of PowerInfer's converters (gguf-py/gguf/vocab.py:SpecialVocab): the token
        that tokenizer_config.json names, if tokenizer.json adds it; then config.json's number, of
        several the first (theirs ignore a list). Last comes a token that is merely named.

        Args:
            kind: which.
            ids: id of each token of the vocabulary.
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
        return None if text is None else ids.get(text.encode("utf-8", "replace"))

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


def _special_texts(source: Mapping[str, Any]) -> Iterator[str]:
    """Yield the special tokens that a settings file names."""
    for key, value in source.items():
        if key.endswith("_token") or key in ("additional_special_tokens", "extra_special_tokens"):
            for token in value if isinstance(value, list) else [value]:
                text = _content(token)
                if text:
                    yield text
