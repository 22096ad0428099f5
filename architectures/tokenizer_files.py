"""What a checkpoint's files say around its tokenizer: added tokens, special tokens, BOS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from architectures.config_json import Config
from common.errors import FETCH_AGAIN, CheckpointError
from common.files import read_json

_NAMES = {"bos": "begin-of-sequence", "eos": "end-of-sequence", "unk": "unknown"}


@dataclass(frozen=True)
class AddedToken:
    """A token that the tokenizer matches as a whole before anything else.

    Attributes:
        content: its text.
        special: whether it controls (`<|im_end|>`) rather than stands for its text.
        lstrip: whether it takes the white space before it.
        rstrip: whether it takes the white space behind it.
        single_word: whether it is found as a word of its own only.
    """

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class TokenizerFiles:
    """The settings around a checkpoint's tokenizer.

    Attributes:
        path: the checkpoint's directory.
        rows: rows of the model's embedding.
        settings: tokenizer_config.json.
        added: added tokens by id, those with a row only.
        notes: a line for each added token without a row.
    """

    def __init__(self, path: Path, config: Config, rows: int) -> None:
        """Read those that are there.

        Args:
            path: the checkpoint's directory.
            config: its config.json.
            rows: rows of the model's embedding.

        Raises:
            CheckpointError: one is damaged, or they contradict each other.
        """
        self.path, self._config, self.rows = path, config, rows
        self.settings = self._read("tokenizer_config.json")
        self._map = self._read("special_tokens_map.json")
        self._generation = self._read("generation_config.json")
        found = self._added()
        self.added = {number: token for number, token in found.items() if number < rows}
        self.notes = tuple(
            f"added token {token.content!r} has id {number}, beyond the model's {rows} rows, "
            "and is left out"
            for number, token in sorted(found.items())
            if number >= rows
        )

    def _read(self, name: str) -> dict[str, Any]:
        file = self.path / name
        return read_json(file, CheckpointError, FETCH_AGAIN) if file.is_file() else {}

    def _added(self) -> dict[int, AddedToken]:
        """Return added tokens by id; what any file calls special is."""
        special = {text for source in (self.settings, self._map) for text in _special_texts(source)}
        found: dict[int, AddedToken] = {}
        for name, number, entry in self._entries():
            content = content_of(entry)
            if not _is_id(number) or not content:
                raise CheckpointError(
                    f"{self.path / name}: added token {content!r} with id {number!r} is no text "
                    "with a number",
                    FETCH_AGAIN,
                )
            before = found.get(number, AddedToken(content, False))
            if before.content != content:
                raise CheckpointError(
                    f"{self.path / name}: id {number} is {content!r} here and {before.content!r} "
                    "in another tokenizer file",
                    "keep the model's own files only",
                )
            flags = entry if isinstance(entry, dict) else vars(before)
            is_special = before.special or flags.get("special") is True or content in special
            sides = {key: flags.get(key) is True for key in ("lstrip", "rstrip", "single_word")}
            found[number] = AddedToken(content, is_special, **sides)
        return found

    def _entries(self) -> Iterator[tuple[str, Any, Any]]:
        """Yield file, id, and the text or description of each entry."""
        for content, number in self._read("added_tokens.json").items():
            yield "added_tokens.json", number, content
        decoder = self.settings.get("added_tokens_decoder")
        for key, token in decoder.items() if isinstance(decoder, dict) else ():
            number = int(key) if key.isdecimal() and len(key) < 10 else key
            yield "tokenizer_config.json", number, token
        tokens = self._read("tokenizer.json").get("added_tokens")
        for token in tokens if isinstance(tokens, list) else ():
            number = token.get("id") if isinstance(token, dict) else token
            yield "tokenizer.json", number, token

    def named(self, kind: str) -> str | None:
        """Return the text of `bos`, `eos`, `unk` or `pad`, None if no tokenizer file names it."""
        key = f"{kind}_token"
        return content_of(self.settings.get(key)) or content_of(self._map.get(key))

    def special_id(
        self, kind: str, ids: Callable[[str], int | None], own: int | None = None
    ) -> tuple[int | None, str | None]:
        """Return the id of a special token, and a note if config.json has another.

        The tokenizer decides: first the token that its files name, if the vocabulary has it, then
        its own. Only where it says nothing a number of config.json counts (of several the first),
        and at last generation_config.json's.

        Args:
            kind: `bos`, `eos`, `unk` or `pad`.
            ids: gives the id of a token's text, None for what is none.
            own: what the tokenizer itself does.
        """
        named = self.named(kind)
        found = None if named is None else ids(named)
        found = own if found is None or found >= self.rows else found
        numbers = self._numbers(kind, self._config)
        if found is None:
            return next(iter([*numbers, *self._numbers(kind, self._generation)]), None), None
        if not numbers or found in numbers or kind not in _NAMES:
            return found, None
        return found, (
            f"config.json has {kind}_token_id {numbers[0]}, the tokenizer's {_NAMES[kind]} token "
            f"is {found}, which counts"
        )

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a text as config.json and generation_config.json say."""
        sources = (self._config, self._generation)
        return frozenset(n for source in sources for n in self._numbers("eos", source))

    def contradiction(self, text: str, number: int, file: Path, other: int) -> CheckpointError:
        """Return the error for an added token that the tokenizer's own file has at another id."""
        return CheckpointError(
            f"{self.path}: added token {text!r} has id {number}, in {file.name} it is {other}",
            f"take the entry {number} out of the files that add it",
        )

    def _numbers(self, kind: str, config: Config) -> list[int]:
        """Return the usable ids of a config's entry, which may be a list."""
        value = config.get(f"{kind}_token_id")
        numbers: list[Any] = value if isinstance(value, list) and kind != "bos" else [value]
        return [int(number) for number in numbers if _is_id(number) and number < self.rows]

    @property
    def add_bos(self) -> bool | None:
        """Whether tokenizer_config.json wants BOS before a text, None if it does not say."""
        value = self.settings.get("add_bos_token")
        return value if isinstance(value, bool) else None

    @property
    def prefix_space(self) -> bool:
        """Whether tokenizer_config.json wants a space before a text of byte-level BPE."""
        return self.settings.get("add_prefix_space") is True


def content_of(token: object) -> str | None:
    """Return the text of a token that a file gives as text or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _is_id(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _special_texts(source: Mapping[str, object]) -> Iterator[str]:
    """Yield the special tokens that a settings file names."""
    for key, value in source.items():
        if key.endswith("_token") or key in ("additional_special_tokens", "extra_special_tokens"):
            for token in value if isinstance(value, list) else [value]:
                text = content_of(token)
                if text:
                    yield text


@dataclass(frozen=True, kw_only=True)
class OpenedTokenizer:
    """What is known of a tokenizer, whichever library encodes with it.

    Attributes:
        file: where it came from.
        files: the settings around it.
        bos: id of the begin-of-sequence token.
        adds_bos: whether the model's own tokenizer puts it before a text, None if nothing says so.
        notes: what a user should know of the ids, a line each.
    """

    file: Path
    files: TokenizerFiles
    bos: int
    adds_bos: bool | None
    notes: tuple[str, ...] = ()

    def bos_id(self) -> int:
        """Return the id of the begin-of-sequence token."""
        return self.bos
