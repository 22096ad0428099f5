"""A vocabulary of all rows of a model, from its own tokens and those that other files add."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gguf import TokenType

from architectures.tokenizer import OwnTokenizer
from architectures.tokenizer_files import AddedToken
from common.errors import CheckpointError
from gguf_export.tokens.vocabulary import NONE, Vocabulary

_REPLACEABLE = (TokenType.CONTROL, TokenType.UNUSED, TokenType.UNKNOWN)


def lay_out(
    tokenizer: OwnTokenizer,
    found: dict[int, tuple[bytes, int]],
    *,
    kind: str,
    eos_id: int | None = None,
    unk_id: int | None = None,
) -> Vocabulary:
    """Return a vocabulary of all rows with added tokens and special ids, but no scores or merges.

    Args:
        tokenizer: the model's own.
        found: text and type by id, without added tokens.
        kind: the vocabulary's.
        eos_id: the tokenizer's own end-of-sequence id, used where no setting names another.
        unk_id: its unknown id, likewise.

    Raises:
        CheckpointError: an added token in the place of an ordinary one.
    """
    rows, files = tokenizer.files.rows, tokenizer.files
    _place_added(tokenizer.file, files.added, found)
    taken = {token for token, _ in found.values()}
    tokens, types = [], []
    for number in range(rows):
        token, token_type = found.get(number, (f"<pad_{number}>".encode(), int(TokenType.UNUSED)))
        while number not in found and token in taken:
            token = b"<" + token + b">"
        tokens.append(token)
        types.append(token_type)
    ids = {token: number for number, token in enumerate(tokens)}

    def id_of(text: str) -> int | None:
        return ids.get(text.encode("utf-8", "replace"))

    eos, said_of_eos = files.special_id("eos", id_of, eos_id)
    unk, said_of_unk = files.special_id("unk", id_of, unk_id)
    pad, _ = files.special_id("pad", id_of)
    said = (note for note in (said_of_eos, said_of_unk) if note is not None)
    vocabulary = Vocabulary(
        kind=kind,
        tokens=tokens,
        types=types,
        bos_id=tokenizer.bos_id(),
        add_bos=tokenizer.adds_bos,
        eos_id=NONE if eos is None else eos,
        unk_id=NONE if unk is None else unk,
        pad_id=NONE if pad is None else pad,
        notes=(*tokenizer.notes, *said),
    )
    vocabulary.mark_control()
    return vocabulary


def _place_added(
    file: Path, added: Mapping[int, AddedToken], found: dict[int, tuple[bytes, int]]
) -> None:
    """Put added tokens at their ids among `found`, text and type by id.

    Raises:
        CheckpointError: one whose id belongs to an ordinary token of another text.
    """
    for number, token in sorted(added.items()):
        text = token.content.encode("utf-8", "replace")
        kind_of_added = int(TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
        held, kind = found.get(number, (text, int(TokenType.NORMAL)))
        if held != text and kind not in _REPLACEABLE:
            raise CheckpointError(
                f"{file}: id {number} is token {held.decode('utf-8', 'replace')!r}, an added token "
                f"calls it {token.content!r}",
                "use the model's own tokenizer files",
            )
        if held != text or kind in (TokenType.NORMAL, TokenType.USER_DEFINED):
            found[number] = text, kind_of_added
