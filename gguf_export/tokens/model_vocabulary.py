"""The vocabulary of a checkpoint for an engine, and how far its ids are the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from gguf import TokenType

from architectures.piece_tokenizer import PieceTokenizer
from architectures.rust_tokenizer import RustTokenizer
from architectures.tokenizer import Tokenizer, load_tokenizer
from common.errors import ExportError
from gguf_export.tokens.json_vocabulary import read_json_vocabulary
from gguf_export.tokens.layout import lay_out
from gguf_export.tokens.vocabulary import (
    BYTE_LEVEL,
    NONE,
    PIECES,
    POWERINFER,
    Vocabulary,
    vocabulary_problems,
)

MIXED_TEXTS = (
    "It was late. The lamps along the harbour had gone out one by one, and nobody spoke.",
    "I'll say it isn't so; they've come, we're here, she'd know, he's gone, I'm sure.",
    "In 1984 about 12,345.67 people (3.5 %) paid $99, i.e. 1/3 of 2²³ or ½ of it.",
    "def f(x):\n    return [y ** 2 for y in range(x) if y % 3 == 0]  # squares\n",
    "class Shop:\n\tname = 'shop'\n\n\tdef __init__(self, path=\"/tmp/x\"):\n\t\tself.p = path\n",
    "for (int i = 0; i < n; ++i) {\n    sum += a[i] * b[i];\n}\n\n\n// done\r\nreturn sum;\r\n",
    "SELECT name, age FROM people WHERE id IN (1, 22, 333) AND city <> 'Rome';",
    '{"key": [1, 2.5e-3, null, true], "text": "a\\nb", "url": "https://example.org/?q=1&r=2"}',
    "中文字符，夹杂 english 和数字123。预测神经元的激活。",
    "日本語のテキストと、한국어 문장, и немного кириллицы; ελληνικά, עברית, العربية ١٢٣.",
    "naïve Café, Ångström, e\u0301 \ufb01 \u2014 \u201cquotes\u201d \u2026 \u00a0nbsp\u200b",
    "emoji 😀 👩\u200d👩\u200d👧 🏳️\u200d🌈 🇫🇷 ☃",
    "control \x01\x02\x07\x1b[0m\x7f characters \ufeff\ufffd \x1c\x1f\x85 \u2028",
    "   leading, trailing spaces   ",
    "a  b   c    d\t\te \t f\n\n\ng \n h",
    " ",
    "\n",
    "x",
)
"""Texts of many kinds, on which an exported tokenizer is measured against the model's own."""


_PADDING_SCORE = -1000.0
_BPE, _USER_DEFINED = 2, 4
"""A model type and a piece's type in sentencepiece_model.proto."""


def read_vocabulary(
    path: Path,
    vocab_size: int,
    config: Mapping[str, object] = {},
    *,
    engine: str = POWERINFER,
) -> Vocabulary:
    """Read a checkpoint's tokenizer: tokenizer.model, tokenizer.json or vocab.json and merges.txt.

    Args:
        path: the checkpoint's directory.
        vocab_size: rows of the model's embedding; more than there are tokens are padded.
        config: its config.json.
        engine: whose ids these are to be, one of `vocabulary`'s names.

    Returns:
        The vocabulary, with a warning for each way in which the engine's ids will differ from the
        model's own, and the share that does on texts of many kinds. Of byte-level BPE that is told
        of PowerInfer alone; see `splitting`.

    Raises:
        CheckpointError: no tokenizer or a damaged one.
        ExportError: one that the engine cannot follow or would stop at.
    """
    tokenizer = load_tokenizer(path, vocab_size, config)
    if isinstance(tokenizer, RustTokenizer):
        vocabulary = read_json_vocabulary(tokenizer, engine)
    else:
        vocabulary = _read_sentencepiece(tokenizer, engine)
    problem = next(vocabulary_problems(vocabulary), None)
    if problem is not None:
        needs = "PowerInfer needs it" if engine == POWERINFER else f"psp writes none for {engine}"
        raise ExportError(f"{tokenizer.file}: {problem}", f"{needs}, use another tokenizer")
    if vocabulary.types[vocabulary.bos_id] != TokenType.CONTROL:
        token = vocabulary.tokens[vocabulary.bos_id].decode("utf-8", "replace")
        raise ExportError(
            f"{tokenizer.file}: BOS is id {vocabulary.bos_id}, {token!r}, no token that controls",
            "set bos_token in tokenizer_config.json to the model's own",
        )
    return _measured(replace(vocabulary, engine=engine), tokenizer)


def _measured(vocabulary: Vocabulary, tokenizer: Tokenizer) -> Vocabulary:
    """Add the share of ids that differ, on texts of many kinds."""
    engine, reasons = vocabulary.engine, list(vocabulary.differences)
    warnings = list(vocabulary.warnings)
    if engine == POWERINFER or vocabulary.kind == PIECES:
        texts = tuple(map(vocabulary.without_absent, MIXED_TEXTS))
        share = share_differing(vocabulary.encode, tokenizer.encode, texts)
        if share and not reasons:
            reasons = [f"{engine}'s ids differ from those of the model's tokenizer"]
        if reasons:
            said = f"{share:.2%} of the ids of texts of many kinds differ from the model's"
            warnings = [*reasons, f"{said} tokenizer", *warnings]
        warnings += _absent(vocabulary)
    if vocabulary.eos_id == NONE:
        default = 11 if vocabulary.kind == BYTE_LEVEL else 2
        warnings.append(
            f"no end-of-sequence id is known, {engine} takes {default}; add it to config.json"
        )
    return replace(vocabulary, differences=tuple(reasons), warnings=tuple(warnings))


def _absent(vocabulary: Vocabulary) -> Iterator[str]:
    bytes_ = sorted(vocabulary.absent_bytes)
    if bytes_:
        named = " ".join(f"{byte:02X}" for byte in bytes_)
        yield (
            f"the vocabulary has no token of {len(bytes_)} bytes that ordinary text does without "
            f"({named}), and {vocabulary.engine} stops at a text that holds one"
        )


def share_differing(
    ours: Callable[[str], list[int]],
    theirs: Callable[[str], list[int]],
    texts: tuple[str, ...] = MIXED_TEXTS,
) -> float:
    """Return the share of ids, of the longer list, that do not match when aligned in order.

    Args:
        ours: gives a text's ids.
        theirs: gives its ids too.
        texts: what to measure on, short ones: aligning takes quadratic time.
    """
    same, total = 0, 0
    for text in texts:
        mine, other = ours(text), theirs(text)
        total += max(len(mine), len(other))
        if mine == other:
            same += len(mine)
        else:
            matcher = SequenceMatcher(None, mine, other, autojunk=False)
            same += sum(block.size for block in matcher.get_matching_blocks())
    return 1 - same / total if total else 0.0


def _read_sentencepiece(tokenizer: PieceTokenizer, engine: str) -> Vocabulary:
    """Turn a SentencePiece model into PowerInfer's lists.

    Types are those of PowerInfer@d3ebd7c convert.py:SentencePieceVocab.

    Raises:
        ExportError: a model that does not merge pairs.
        CheckpointError: an added token in the place of a piece.
    """
    model = tokenizer.model
    trainer, normaliser, user_defined = _sections(model.serialized_model_proto())
    if trainer.get(3, 1) != _BPE:
        raise ExportError(
            f"{tokenizer.file}: is no BPE model, the only kind whose pieces {_finder(engine)}",
            "use a model with a BPE tokenizer",
        )
    size = model.vocab_size()
    found = {
        number: (model.id_to_piece(number).encode(), _type(model, number)) for number in range(size)
    }
    eos_id = model.eos_id() if model.eos_id() >= 0 else None
    vocabulary = lay_out(tokenizer, found, kind=PIECES, eos_id=eos_id, unk_id=model.unk_id())
    scores = [model.get_score(number) for number in range(size)]
    scores += [_PADDING_SCORE] * (len(vocabulary.tokens) - size)
    return replace(
        vocabulary,
        scores=scores,
        space_prefix=bool(normaliser.get(3, 1)),
        differences=tuple(_differences(normaliser, user_defined, engine)),
    )


def _finder(engine: str) -> str:
    """Say who finds pieces of BPE models alone."""
    return "PowerInfer finds" if engine == POWERINFER else f"psp writes for {engine}"


def _type(tokenizer: Any, number: int) -> int:
    if tokenizer.is_unknown(number):
        return int(TokenType.UNKNOWN)
    if tokenizer.is_control(number):
        return int(TokenType.CONTROL)
    if tokenizer.is_byte(number):
        return int(TokenType.BYTE)
    if tokenizer.is_unused(number):
        return int(TokenType.UNUSED)
    return int(TokenType.NORMAL)


def _sections(proto: bytes) -> tuple[dict[int, Any], dict[int, Any], int]:
    """Return trainer's and normaliser's settings by field, and the number of user-defined pieces.

    Source: sentencepiece_model.proto:ModelProto.
    """
    sections: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    user_defined = 0
    for number, value in _fields(proto):
        if number == 1:
            user_defined += dict(_fields(value)).get(3) == _USER_DEFINED
        elif number in sections:
            sections[number] = dict(_fields(value))
    return sections[2], sections[3], user_defined


def _differences(normaliser: dict[int, Any], user_defined: int, engine: str) -> Iterator[str]:
    """Yield what makes SentencePiece's ids differ (sentencepiece_model.proto:NormalizerSpec)."""
    if normaliser.get(2):
        name = bytes(normaliser.get(1, b"")).decode("utf-8", "replace")
        yield f"tokenizer.model normalises text ({name}), {engine} does not"
    if engine == POWERINFER and not normaliser.get(3, 1):
        yield "tokenizer.model puts no space before a text, PowerInfer does"
    if normaliser.get(4, 1):
        yield f"tokenizer.model drops repeated spaces, {engine} keeps them"
    if user_defined:
        yield (
            f"tokenizer.model matches {user_defined} user-defined pieces whole, "
            f"{engine} merges them from characters or not at all"
        )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of the fields of a message in protobuf's wire format.

    SentencePiece has parsed the same bytes, so they are well-formed.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        size, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
