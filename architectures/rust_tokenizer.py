"""Tokenizers of Hugging Face's `tokenizers`: tokenizer.json, or vocab.json with merges.txt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from architectures.tokenizer_files import OpenedTokenizer, TokenizerFiles
from common.errors import FETCH_AGAIN, CheckpointError
from common.files import read_whole

if TYPE_CHECKING:
    import tokenizers

_KINDS = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True, kw_only=True)
class RustTokenizer(OpenedTokenizer):
    """A tokenizer of the `tokenizers` library.

    Attributes:
        rust: the library's object.
    """

    rust: tokenizers.Tokenizer

    @property
    def source(self) -> str:
        """Whose ids these are."""
        return f"those of {self.file.name}, by tokenizers"

    @property
    def bos_text(self) -> str:
        """How the begin-of-sequence token is written."""
        return self.rust.id_to_token(self.bos) or ""

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a text."""
        named = self.files.named("eos")
        own = None if named is None else self.rust.token_to_id(named)
        found = () if own is None or own >= self.files.rows else (own,)
        return self.files.end_ids.union(found)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without begin- and end-of-sequence tokens."""
        with damage_refused(self.file):
            ids: list[int] = self.rust.encode(text, add_special_tokens=False).ids
            return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens included."""
        with damage_refused(self.file):
            return str(self.rust.decode(ids, skip_special_tokens=False))

    @cached_property
    def byte_level(self) -> bool:
        """Whether texts are spelt in GPT-2's bytes, before which PowerInfer puts no BOS."""
        return spells_bytes(self.document())

    def document(self) -> dict[str, Any]:
        """Return its description in the form of tokenizer.json, merges as pairs."""
        with damage_refused(self.file):
            document: dict[str, Any] = json.loads(self.rust.to_str())
            return document

    def split(self, text: str) -> list[str]:
        """Return the words that merges do not reach across, as the tokenizer spells them."""
        splitter = self.rust.pre_tokenizer
        with damage_refused(self.file):
            words = [] if splitter is None else splitter.pre_tokenize_str(text)
        return [word for word, _ in words]

    def merge(self, words: Iterable[str]) -> list[list[int]]:
        """Return the ids of byte-level words by merges alone, whatever splits texts into words."""
        import tokenizers

        document = self.document()
        document["model"]["ignore_merges"] = False
        with damage_refused(self.file):
            model = tokenizers.Tokenizer.from_str(json.dumps(document)).model
            return [[token.id for token in model.tokenize(word)] for word in words]


@contextmanager
def damage_refused(file: Path) -> Iterator[None]:
    """Turn whatever the library raises into the one-line error of a damaged file."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, CheckpointError):
        raise
    except BaseException as error:  # a panic of the Rust code is no Exception
        raise CheckpointError(
            f"{file}: cannot be used as a tokenizer ({error})", FETCH_AGAIN
        ) from error


def open_json(file: Path) -> tokenizers.Tokenizer:
    """Open a tokenizer.json.

    Raises:
        CheckpointError: it is damaged.
    """
    import tokenizers

    data = read_whole(file, CheckpointError, FETCH_AGAIN)
    with damage_refused(file):
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
        tokenizer.no_truncation()  # the file may keep settings of its last use
        tokenizer.no_padding()
    return tokenizer


def open_pair(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """Open GPT-2's vocab.json and merges.txt.

    Raises:
        CheckpointError: one is damaged.
    """
    import tokenizers

    for part in (vocab, merges):
        read_whole(part, CheckpointError, FETCH_AGAIN)  # neither huge nor without end
    with damage_refused(vocab):
        model = tokenizers.models.BPE.from_file(str(vocab), str(merges))
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def complete(file: Path, rust: tokenizers.Tokenizer, files: TokenizerFiles) -> tokenizers.Tokenizer:
    """Return a tokenizer with what the files around it say, as transformers has it.

    Tokens that other files add are matched in texts at their ids, named special tokens are matched
    too, those without a row are not, and a space goes in front where `add_prefix_space` says so.

    Raises:
        CheckpointError: it has more tokens than the model has rows, or files contradict each other.
    """
    import tokenizers

    with damage_refused(file):
        vocab: dict[str, int] = rust.get_vocab(with_added_tokens=False)
        added = rust.get_added_tokens_decoder().items()
        count = max((n for t, n in vocab.items() if not _added_at(files, n, t)), default=-1) + 1
        check_rows(file, "tokens", count, files.rows)
        absent = any(rust.token_to_id(token.content) != n for n, token in files.added.items())
        beyond = any(files.added.get(number) is None for number, _ in added)
        if absent or beyond or files.prefix_space:
            document = _rewritten(file, json.loads(rust.to_str()), files)
            rust = tokenizers.Tokenizer.from_str(json.dumps(document))
        named = {token for kind in _KINDS if (token := files.named(kind))}
        rust.add_special_tokens(sorted(t for t in named if rust.token_to_id(t) is not None))
    return rust


def _added_at(files: TokenizerFiles, number: int, token: str) -> bool:
    return number in files.added and files.added[number].content == token


def _rewritten(file: Path, document: dict[str, Any], files: TokenizerFiles) -> dict[str, Any]:
    """Return a description that holds exactly the added tokens of all files, at their ids.

    The library numbers added tokens in turn; those of the model's own vocabulary keep their ids.
    """
    vocab = document["model"].get("vocab")
    if not isinstance(vocab, dict):
        vocab = {}
    for number, token in files.added.items():
        if vocab.setdefault(token.content, number) != number:
            raise files.contradiction(token.content, number, file, vocab[token.content])
    document["added_tokens"] = [
        {"id": number, "normalized": False, **vars(token)}
        for number, token in sorted(files.added.items())
    ]
    if files.prefix_space:
        for step in steps_of(document.get("pre_tokenizer"), "pretokenizers"):
            if step["type"] == "ByteLevel":
                step["add_prefix_space"] = True
    return document


def steps_of(step: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    """Yield the single steps of a description's pre-tokenizer, normalizer or post-processor."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for part in step[inner]:
            yield from steps_of(part, inner)
    else:
        yield step


def spells_bytes(document: dict[str, Any]) -> bool:
    """Tell whether a description's texts are spelt in GPT-2's bytes."""
    steps = steps_of(document.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "ByteLevel" for step in steps)


def first_id(file: Path, rust: tokenizers.Tokenizer) -> int | None:
    """Return the id that a tokenizer puts before a text, None if it puts none."""
    with damage_refused(file):
        plain = rust.encode("a", add_special_tokens=False).ids
        full = rust.encode("a").ids
    at = len(full) - len(plain)
    found = next((n for n in range(at + 1) if full[n : n + len(plain)] == plain), 0)
    return int(full[0]) if plain and found else None


def check_rows(file: Path, unit: str, count: int, rows: int) -> None:
    """Refuse more tokens than a model has rows."""
    if count > rows:
        raise CheckpointError(
            f"{file}: has {count} {unit}, the model {rows} rows",
            f"use the model's own {file.name}",
        )


def vocabulary_of(file: Path, rust: tokenizers.Tokenizer) -> Mapping[str, int]:
    """Return token to id, without added tokens."""
    with damage_refused(file):
        vocab: dict[str, int] = rust.get_vocab(with_added_tokens=False)
        return vocab
