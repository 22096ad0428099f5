"""The checkpoint's own tokenizer and the name of its chat template.

tokenizer.model is read by SentencePiece; tokenizer.json, and the vocab.json with merges.txt of
GPT-2's byte-level BPE, by Hugging Face's `tokenizers`. No code of a checkpoint is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from architectures.config_json import Config
from common.errors import FETCH_AGAIN, CheckpointError
from common.files import read_json

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer(Protocol):
    """What psp needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without begin- and end-of-sequence tokens."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        ...

    def bos_id(self) -> int:
        """Return the id of the begin-of-sequence token."""
        ...


def load_tokenizer(path: Path, vocab_size: int, config: Config | None = None) -> Tokenizer:
    """Load the first of tokenizer.model, tokenizer.json, vocab.json with merges.txt.

    Args:
        path: the checkpoint's directory.
        vocab_size: rows of the model's embedding, at least as many as there are tokens.
        config: its config.json, whose `bos_token_id` counts for all but tokenizer.model.

    Raises:
        CheckpointError: no tokenizer, a damaged one, one without a begin-of-sequence token or with
            more tokens than the model has rows. `encode` raises it too: some damage shows only in
            use.
    """
    if (path / "tokenizer.model").is_file():
        tokenizer: Tokenizer = load_sentencepiece(path, vocab_size)
        return tokenizer
    file, rust = _read_rust(path)
    _check_rows(file, "tokens", max(rust.get_vocab().values(), default=-1) + 1, vocab_size)
    return RustTokenizer(file, rust, _bos_id(path, rust, vocab_size, config or {}))


def load_sentencepiece(path: Path, vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """Load `tokenizer.model` from a checkpoint's directory.

    Args:
        path: the directory.
        vocab_size: rows of the model's embedding, at least as many as there are pieces.

    Raises:
        CheckpointError: the file is missing, damaged, has no begin-of-sequence piece or more
            pieces than the model has rows.
    """
    import sentencepiece

    file = path / "tokenizer.model"
    if not file.is_file():
        raise CheckpointError(
            f"{file}: not found", "psp needs the model's SentencePiece tokenizer.model"
        )
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{file}: not a SentencePiece model", FETCH_AGAIN) from error
    if tokenizer.bos_id() < 0:
        raise CheckpointError(
            f"{file}: has no BOS piece, which PowerInfer needs", "use another tokenizer.model"
        )
    _check_rows(file, "pieces", tokenizer.vocab_size(), vocab_size)
    return tokenizer


def chat_template_of(path: Path) -> str | None:
    """Return the Jinja text of a checkpoint's chat template, None if it has none.

    It is chat_template.jinja, which newer checkpoints have, else `chat_template` in
    tokenizer_config.json: a text, or named texts of which `default` counts.

    Raises:
        CheckpointError: a file that cannot be read, or a template that is none of these.
    """
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error})", FETCH_AGAIN) from error
    template = _read_optional(path / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else template
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"{path / 'tokenizer_config.json'}: chat_template is neither text nor a list with a "
            "'default' one",
            "name the format with --chat-template",
        )
    return template


@dataclass(frozen=True)
class RustTokenizer:
    """A tokenizer of the `tokenizers` library.

    Attributes:
        file: where it came from.
        rust: the library's object.
        bos: id of the begin-of-sequence token.
    """

    file: Path
    rust: tokenizers.Tokenizer
    bos: int

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without begin- and end-of-sequence tokens."""
        with _damage_refused(self.file):
            ids: list[int] = self.rust.encode(text, add_special_tokens=False).ids
            return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens included."""
        with _damage_refused(self.file):
            return str(self.rust.decode(ids, skip_special_tokens=False))

    def bos_id(self) -> int:
        """Return the id of the begin-of-sequence token."""
        return self.bos

    def document(self) -> dict[str, Any]:
        """Return its description in the form of tokenizer.json, merges as pairs."""
        with _damage_refused(self.file):
            document: dict[str, Any] = json.loads(self.rust.to_str())
            return document

    def adds_bos(self) -> bool:
        """Tell whether its post-processor puts BOS before a text."""
        with _damage_refused(self.file):
            return self.rust.encode("").ids[:1] == [self.bos]

    def merge(self, words: Iterable[str]) -> list[list[int]]:
        """Return the ids of byte-level words by merges alone, whatever splits texts into words."""
        import tokenizers

        document = self.document()
        document["model"]["ignore_merges"] = False
        with _damage_refused(self.file):
            model = tokenizers.Tokenizer.from_str(json.dumps(document)).model
            return [[token.id for token in model.tokenize(word)] for word in words]


@contextmanager
def _damage_refused(file: Path) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust code is no Exception
        raise CheckpointError(
            f"{file}: cannot be used as a tokenizer ({error})", FETCH_AGAIN
        ) from error


def _read_rust(path: Path) -> tuple[Path, tokenizers.Tokenizer]:
    import tokenizers

    file, vocab, merges = (path / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    if file.is_file():
        with _damage_refused(file):
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
            tokenizer.no_truncation()  # the file may keep settings of its last use
            tokenizer.no_padding()
        return file, tokenizer
    if vocab.is_file() and merges.is_file():
        return vocab, _read_byte_level(vocab, merges)
    raise CheckpointError(
        f"{path / 'tokenizer.model'}: not found, nor tokenizer.json, nor vocab.json with "
        "merges.txt",
        "add the model's SentencePiece tokenizer.model or one of the others",
    )


def _read_byte_level(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """Return GPT-2's tokenizer as transformers builds it, its special tokens matched in texts."""
    import tokenizers

    settings = _read_optional(vocab.with_name("tokenizer_config.json"))
    with _damage_refused(vocab):
        model = tokenizers.models.BPE.from_file(str(vocab), str(merges))
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = {token for key in _SPECIAL if (token := _content(settings.get(key)))}
        known = sorted(token for token in special if tokenizer.token_to_id(token) is not None)
        tokenizer.add_special_tokens(known)
    return tokenizer


def _check_rows(file: Path, unit: str, count: int, vocab_size: int) -> None:
    if count > vocab_size:
        raise CheckpointError(
            f"{file}: has {count} {unit}, the model {vocab_size} rows",
            f"use the model's own {file.name}",
        )


def _bos_id(path: Path, tokenizer: tokenizers.Tokenizer, vocab_size: int, config: Config) -> int:
    for values in (config, _read_optional(path / "generation_config.json")):
        number = values.get("bos_token_id")
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < vocab_size:
            return number
    token = _content(_read_optional(path / "tokenizer_config.json").get("bos_token"))
    found = tokenizer.token_to_id(token) if token else None
    if found is None:
        raise CheckpointError(
            f"{path / 'config.json'}: no usable bos_token_id, nor one in generation_config.json, "
            "nor a bos_token of the vocabulary in tokenizer_config.json",
            "add the model's bos_token_id to config.json",
        )
    return found


def _content(token: object) -> str | None:
    """Return the text of a token that a config gives as text or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_optional(file: Path) -> dict[str, Any]:
    return read_json(file, CheckpointError, FETCH_AGAIN) if file.is_file() else {}
