"""The checkpoint's own tokenizer and the name of its chat template.

One reading serves every command. tokenizer.model is read by SentencePiece; tokenizer.json, and the
vocab.json with merges.txt of GPT-2's byte-level BPE, by Hugging Face's `tokenizers`. Tokens that
other files add are found as they are in transformers. No code of a checkpoint is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from architectures.config_json import Config
from architectures.piece_tokenizer import PieceTokenizer, open_pieces
from architectures.rust_tokenizer import (
    RustTokenizer,
    check_rows,
    complete,
    first_id,
    open_json,
    open_pair,
    vocabulary_of,
)
from architectures.tokenizer_files import TokenizerFiles
from common.errors import FETCH_AGAIN, CheckpointError
from common.files import read_json, read_whole

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")


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

    @property
    def byte_level(self) -> bool:
        """Whether texts are spelt in GPT-2's bytes, before which PowerInfer puts no BOS."""
        ...


OwnTokenizer: TypeAlias = PieceTokenizer | RustTokenizer
"""A checkpoint's."""


def load_tokenizer(path: Path, vocab_size: int, config: Config | None = None) -> OwnTokenizer:
    """Load the first usable of tokenizer.model, tokenizer.json, vocab.json with merges.txt.

    Where tokenizer.json has another vocabulary than tokenizer.model, tokenizer.json counts, as for
    transformers: the other is then of the model that this one was made from.

    Args:
        path: the checkpoint's directory.
        vocab_size: rows of the model's embedding, at least as many as there are tokens.
        config: its config.json, for what the tokenizer's files do not say.

    Raises:
        CheckpointError: no tokenizer, a damaged one, one without a begin-of-sequence token or with
            more tokens than the model has rows, or files that contradict each other. `encode`
            raises it too: some damage shows only in use.
    """
    files = TokenizerFiles(path, config or {}, vocab_size)
    notes = list(files.notes)
    pieces = _choose_pieces(path, files, notes)
    if pieces is not None:
        return _piece_tokenizer(path / "tokenizer.model", pieces, files, notes)
    return _rust_tokenizer(path, files, notes)


def _choose_pieces(
    path: Path, files: TokenizerFiles, notes: list[str]
) -> sentencepiece.SentencePieceProcessor | None:
    """Return tokenizer.model if it is there and not overruled by tokenizer.json; note why not."""
    model, other = path / "tokenizer.model", path / "tokenizer.json"
    if not model.is_file():
        return None
    try:
        pieces = open_pieces(model)
    except CheckpointError:
        if not other.is_file():
            raise
        notes.append(f"{model.name} is not a SentencePiece model, {other.name} counts")
        return None
    if other.is_file():
        found = vocabulary_of(other, open_json(other))
        own = {pieces.id_to_piece(number): number for number in range(pieces.vocab_size())}
        if _ordinary(found, files) != _ordinary(own, files):
            notes.append(
                f"{model.name} has another vocabulary ({len(own)} pieces) than {other.name} "
                f"({len(found)} tokens), which counts, as for transformers"
            )
            return None
    return pieces


def _ordinary(vocab: Mapping[str, int], files: TokenizerFiles) -> dict[str, int]:
    return {token: number for token, number in vocab.items() if number not in files.added}


def _piece_tokenizer(
    file: Path,
    pieces: sentencepiece.SentencePieceProcessor,
    files: TokenizerFiles,
    notes: list[str],
) -> PieceTokenizer:
    check_rows(file, "pieces", pieces.vocab_size(), files.rows)
    added = {token.content: number for number, token in files.added.items()}

    def id_of(text: str) -> int | None:
        number = pieces.piece_to_id(text)
        return added.get(text, number if pieces.id_to_piece(number) == text else None)

    for text, number in added.items():
        if pieces.piece_to_id(text) not in (number, pieces.unk_id()):
            raise files.contradiction(text, number, file, pieces.piece_to_id(text))
    own = pieces.bos_id() if pieces.bos_id() >= 0 else None
    bos, note = files.special_id("bos", id_of, own)
    if bos is None or (own is None and id_of(files.named("bos") or "") is None):
        raise CheckpointError(
            f"{file}: has no BOS piece, with which psp begins every text, and "
            "tokenizer_config.json names no bos_token of it",
            "use another tokenizer.model",
        )
    found = PieceTokenizer(file=file, model=pieces, files=files, bos=bos, adds_bos=files.add_bos)
    notes += _bos_notes(files, note, bos, found.bos_text, adds=files.add_bos is not False)
    notes += _class_notes(files, file)
    return replace(found, notes=tuple(notes))


def _rust_tokenizer(path: Path, files: TokenizerFiles, notes: list[str]) -> RustTokenizer:
    file, rust = _open_rust(path)
    rust = complete(file, rust, files)
    first = first_id(file, rust)
    known = rust.token_to_id if first is None else lambda text: None
    bos, note = files.special_id("bos", known, first)
    if bos is None:
        raise CheckpointError(
            f"{path / 'config.json'}: no usable bos_token_id, nor one in generation_config.json, "
            "nor a bos_token of the vocabulary in tokenizer_config.json",
            "add the model's bos_token_id to config.json",
        )
    adds = (first is not None or None) if files.add_bos is None else files.add_bos
    made = RustTokenizer(file=file, rust=rust, files=files, bos=bos, adds_bos=adds)
    notes += _bos_notes(files, note, bos, made.bos_text, adds=bool(adds))
    notes += _class_notes(files, file)
    return replace(made, notes=tuple(notes))


def _bos_notes(
    files: TokenizerFiles, note: str | None, bos: int, text: str, *, adds: bool
) -> Iterator[str]:
    if note is not None:
        yield note
    if not adds:
        why = "" if files.add_bos is None else " (add_bos_token is false)"
        yield (
            f"the model's own tokenizer puts nothing before a text{why}, psp's windows begin with "
            f"{text!r} (id {bos})"
        )


def _class_notes(files: TokenizerFiles, file: Path) -> Iterator[str]:
    name = files.settings.get("tokenizer_class")
    if name in _LLAMA:
        yield (
            f"tokenizer_config.json names {name}, which in transformers 5 gives a text that begins "
            f"with spaces one fewer; psp and the files it writes follow {file.name}"
        )


def load_sentencepiece(path: Path, vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """Load `tokenizer.model` from a checkpoint's directory, without what other files say.

    Args:
        path: the directory.
        vocab_size: rows of the model's embedding, at least as many as there are pieces.

    Raises:
        CheckpointError: the file is missing, damaged, or has more pieces than the model has rows.
    """
    file = path / "tokenizer.model"
    tokenizer = open_pieces(file)
    check_rows(file, "pieces", tokenizer.vocab_size(), vocab_size)
    return tokenizer


def _open_rust(path: Path) -> tuple[Path, tokenizers.Tokenizer]:
    file, vocab, merges = (path / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    if file.is_file():
        return file, open_json(file)
    if vocab.is_file() and merges.is_file():
        return vocab, open_pair(vocab, merges)
    raise CheckpointError(
        f"{path / 'tokenizer.model'}: not found, nor tokenizer.json, nor vocab.json with "
        "merges.txt",
        "add the model's SentencePiece tokenizer.model or one of the others",
    )


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
            return read_whole(file, CheckpointError, FETCH_AGAIN).decode()
        except UnicodeDecodeError as error:
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


def _read_optional(file: Path) -> dict[str, Any]:
    return read_json(file, CheckpointError, FETCH_AGAIN) if file.is_file() else {}
