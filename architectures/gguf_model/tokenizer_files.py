"""Tokenizer files of a Hugging Face directory, made from a file's own vocabulary.

Kind `llama` becomes a SentencePiece model, kind `gpt2` a tokenizer.json. Keys: llama.cpp's gguf-py
constants; what is missing gets PowerInfer@d3ebd7c llama.cpp:llm_load_vocab's defaults.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType

from architectures.gguf_model.keys import FETCH_FILE, text_of
from common.errors import CheckpointError
from gguf_files.reader import GGUFFile

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Special tokens as Hugging Face calls them, and as keys do."""
_DEFAULTS = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "gpt2": {"bos": 11, "eos": 11}}


@dataclass(frozen=True)
class FileVocabulary:
    """A file's vocabulary, as long as the arrays that belong to it.

    Attributes:
        file: the file.
        kind: `llama` or `gpt2`.
        tokens: text of each id.
        types: `gguf.TokenType` of each.
        special: id of `bos`, `eos`, `unk` and `pad`, those that there are.
    """

    file: GGUFFile
    kind: str
    tokens: list[str]
    types: list[int]
    special: dict[str, int]

    def flag(self, name: str, default: bool) -> bool:
        """Return a flag of the tokenizer."""
        return bool(self.file.optional(f"tokenizer.ggml.{name}", GGUFValueType.BOOL, default))

    def error(self, problem: str) -> CheckpointError:
        """Return the error for what cannot be a vocabulary."""
        return CheckpointError(f"{self.file.path}: {problem}", FETCH_FILE)


def special_ids(file: GGUFFile) -> dict[str, int]:
    """Return `bos_token_id` and its like for a config.json; nothing of a file without vocabulary.

    Raises:
        FormatError: an id of another type.
    """
    kind = file.optional("tokenizer.ggml.model", GGUFValueType.STRING, "")
    return {f"{name}_token_id": number for name, number in _special(file, kind).items()}


def _special(file: GGUFFile, kind: str) -> dict[str, int]:
    found = dict(_DEFAULTS.get(kind, {}))
    for name, key in _SPECIAL.items():
        value = file.values.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None and value.element is None and isinstance(value.data, int):
            found[name] = value.data
    return found


def write_tokenizer_files(file: GGUFFile, directory: Path) -> None:
    """Write tokenizer files into a directory.

    Raises:
        CheckpointError: no vocabulary, one of another kind, or lists that do not fit together.
        FormatError: a key of another type.
    """
    vocabulary = read_vocabulary(file)
    from architectures.gguf_model import byte_level, sentence_pieces

    write: Callable[[FileVocabulary, Path], dict[str, Any]]
    write = sentence_pieces.write if vocabulary.kind == "llama" else byte_level.write
    settings = write(vocabulary, directory)
    for name, number in vocabulary.special.items():
        settings[f"{name}_token"] = vocabulary.tokens[number]
    template = file.values.get("tokenizer.chat_template")
    if template is not None:
        settings["chat_template"] = text_of(template.data)
    settings |= {"clean_up_tokenization_spaces": False, "added_tokens_decoder": _added(vocabulary)}
    text = json.dumps(settings, ensure_ascii=False, indent=2)
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _added(vocabulary: FileVocabulary) -> dict[str, dict[str, Any]]:
    """Return the tokens that are found whole in texts: control tokens and those of users."""
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    whole = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    return {
        str(number): {"content": token, "special": kind != TokenType.USER_DEFINED, **plain}
        for number, (token, kind) in enumerate(
            zip(vocabulary.tokens, vocabulary.types, strict=True)
        )
        if kind in whole
    }


def read_vocabulary(file: GGUFFile) -> FileVocabulary:
    """Read and check a file's vocabulary.

    Raises:
        CheckpointError: none, another kind, or lists that do not fit together.
        FormatError: a key of another type.
    """
    if "tokenizer.ggml.tokens" not in file.values:
        raise CheckpointError(f"{file.path}: holds no vocabulary", FETCH_FILE)
    kind = file.value("tokenizer.ggml.model", GGUFValueType.STRING)
    if kind not in _DEFAULTS:
        raise CheckpointError(
            f"{file.path}: tokenizer {kind!r} is not supported, expected 'llama' or 'gpt2'",
            "pass the model's Hugging Face directory",
        )
    raw = file.value("tokenizer.ggml.tokens", GGUFValueType.ARRAY, GGUFValueType.STRING)
    try:
        tokens = [token.decode() for token in raw]
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file.path}: a token is not UTF-8", FETCH_FILE) from error
    types = file.value("tokenizer.ggml.token_type", GGUFValueType.ARRAY, GGUFValueType.INT32)
    vocabulary = FileVocabulary(file, kind, tokens, types.tolist(), _special(file, kind))
    if len(types) != len(tokens):
        raise vocabulary.error(f"{len(tokens)} tokens have {len(types)} types")
    if len(set(tokens)) != len(tokens) or not all(tokens):
        raise vocabulary.error("a token of its vocabulary is empty or appears twice")
    for name, number in vocabulary.special.items():
        if not 0 <= number < len(tokens):
            raise vocabulary.error(
                f"{_SPECIAL[name]}_token_id {number} is none of {len(tokens)} tokens"
            )
    return vocabulary
