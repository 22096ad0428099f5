"""A file's tokenizer against the model's: as psp reads it, and as transformers loads it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from gguf import TokenType

from architectures.checkpoint import Checkpoint
from architectures.rust_tokenizer import RustTokenizer
from architectures.tokenizer import OwnTokenizer
from common.errors import FormatError, reason
from gguf_export.contract import OpenedFile
from gguf_export.tokens.encoders import spell, split_words
from gguf_export.tokens.model_vocabulary import read_vocabulary, share_differing
from gguf_export.tokens.vocabulary import (
    BYTE_LEVEL,
    NONE,
    PIECES,
    POWERINFER,
    SPACE_KEY,
    Vocabulary,
)

_DEFAULTS = {PIECES: {"eos_id": 2, "unk_id": 0}, BYTE_LEVEL: {"eos_id": 11}}
"""Ids that PowerInfer@d3ebd7c llama.cpp:llm_load_vocab takes where a file has no key for them."""

_MIXED = (
    "def f(x):\n\treturn [y ** 2 for y in x]  # naïve Café\r\n   three spaces, 中文字符 и кириллица"
    ", 😀👩\u200d👧 emoji \x01\x07\x1b[0m\x7f control, e\u0301 \ufeff\ufffd \n\n    trailing  "
)


def same_ids(opened: OpenedFile, checkpoint: Checkpoint, text: str) -> str:
    """Demand the model's vocabulary, and its ids as far as the engine's algorithm gives them.

    The tokens are also held to those of transformers' loader, which knows nothing of psp, and it is
    said how far its ids are those of the model's files.

    Args:
        opened: the file.
        checkpoint: the model.
        text: prose; code and other scripts are added.

    Raises:
        FormatError: another vocabulary, or other ids without a known reason.
    """
    vocabulary, tokenizer = opened.vocabulary, checkpoint.tokenizer()
    rows = len(vocabulary.tokens)
    expected = read_vocabulary(
        checkpoint.directory, rows, checkpoint.config, engine=vocabulary.engine
    )
    require_vocabulary(vocabulary, expected)
    parts = [vocabulary.without_absent(part) for part in (text, _MIXED)]
    count = sum(_same_part(vocabulary, expected, tokenizer, part) for part in parts)
    texts = (*parts[0].splitlines(), parts[1])
    theirs = _against_transformers(checkpoint, vocabulary, tokenizer, texts)
    if not expected.differences:
        return f"{count} ids equal {tokenizer.source}, prose and mixed scripts; {theirs}"
    share = share_differing(vocabulary.encode, tokenizer.encode, texts)
    reasons = "; ".join(expected.differences)
    return f"the model's vocabulary; {share:.2%} of ids differ: {reasons}; {theirs}"


def require_vocabulary(vocabulary: Vocabulary, expected: Vocabulary) -> None:
    """Do nothing if a file's ids mean what the model's mean.

    Args:
        vocabulary: the file's.
        expected: what an export of the model would write.

    Raises:
        FormatError: they do not.
    """
    if vocabulary.bos_id != expected.bos_id:
        raise FormatError(f"BOS is {vocabulary.bos_id}, the model's is {expected.bos_id}")
    for name in ("kind", "tokens", "types", "merges", "eos_id", "unk_id", "pad_id"):
        if _effective(vocabulary, name) != _effective(expected, name):
            raise FormatError(f"tokenizer: {name} differ from the model's", "export it again")
    if vocabulary.space_prefix != expected.space_prefix and vocabulary.engine != POWERINFER:
        said = "a space" if expected.space_prefix else "none"
        raise FormatError(
            f"{SPACE_KEY}: {vocabulary.engine} puts {'a' if vocabulary.space_prefix else 'no'} "
            f"space before a text of this file, the model's tokenizer {said}",
            "export it again",
        )
    if not np.array_equal(vocabulary.scores, np.array(expected.scores, dtype=np.float32)):
        raise FormatError("tokenizer: scores differ from the model's", "export it again")


def _effective(vocabulary: Vocabulary, name: str) -> object:
    """Return an attribute, with the id that PowerInfer takes where a file names none."""
    found = getattr(vocabulary, name)
    return _DEFAULTS[vocabulary.kind].get(name, NONE) if found == NONE else found


def _same_part(
    vocabulary: Vocabulary, expected: Vocabulary, tokenizer: OwnTokenizer, part: str
) -> int:
    """Compare the ids of a text; return their number."""
    ours, theirs = vocabulary.encode(part), tokenizer.encode(part)
    if isinstance(tokenizer, RustTokenizer) and vocabulary.kind == BYTE_LEVEL:
        merged = tokenizer.merge(map(spell, split_words(part)))  # by their merges, our words
        theirs = [number for ids in merged for number in ids]
    if ours != theirs and (vocabulary.kind == BYTE_LEVEL or not expected.differences):
        pairs = enumerate(zip(ours, theirs, strict=False))
        same = next((at for at, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        raise FormatError(f"token ids differ from the model's after {same} equal ones")
    return len(ours)


def _against_transformers(
    checkpoint: Checkpoint, vocabulary: Vocabulary, tokenizer: OwnTokenizer, texts: tuple[str, ...]
) -> str:
    """Compare with transformers' loader, of local files and without their code.

    Raises:
        FormatError: a token has another text there.
    """
    try:
        with _silence():
            loaded = load_with_transformers(checkpoint)
            encode = partial(loaded.encode, add_special_tokens=False)
            share = share_differing(tokenizer.encode, encode, texts)
            begun = loaded.encode("a")[:1] == [tokenizer.bos_id()]
    except Exception as error:  # of many kinds: missing packages, unknown classes, damage
        return f"transformers does not load this tokenizer ({reason(error)})"
    for token, number in loaded.get_vocab().items():
        held = number < len(vocabulary.tokens) and vocabulary.types[number] != TokenType.UNUSED
        if held and vocabulary.tokens[number] != token.encode():
            shown = vocabulary.tokens[number].decode("utf-8", "replace")
            raise FormatError(
                f"token {number} is {shown!r}, for transformers {token!r}",
                "keep the model's own tokenizer files only, and export again",
            )
    ids = f"other ids for {share:.2%}" if share else "the same ids"
    return (
        f"transformers' {type(loaded).__name__} gives {ids}, {'BOS' if begun else 'no BOS'} first"
    )


def load_with_transformers(checkpoint: Checkpoint) -> Any:
    """Return the tokenizer that transformers makes of a checkpoint's directory."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(checkpoint.directory), local_files_only=True, trust_remote_code=False
    )


@contextmanager
def _silence() -> Iterator[None]:
    """Keep warnings of transformers to itself: what matters is compared."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
