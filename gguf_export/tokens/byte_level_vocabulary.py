"""A byte-level BPE vocabulary, from tokenizer.json or vocab.json with merges.txt."""

from __future__ import annotations

from collections.abc import Iterator

from gguf import TokenType

from architectures.tokenizer import RustTokenizer
from gguf_export.tokens.added_tokens import TokenizerFiles
from gguf_export.tokens.byte_level_encoder import BYTE_TOKENS
from gguf_export.tokens.json_tokenizer import JsonTokenizer, pre_tokeniser_name
from gguf_export.tokens.sentencepiece_vocabulary import place_added
from gguf_export.tokens.vocabulary import BYTE_LEVEL, NONE, Vocabulary, lay_out, mark_control

_ALPHABET = frozenset(BYTE_TOKENS)


def read_byte_level(
    source: JsonTokenizer, tokenizer: RustTokenizer, files: TokenizerFiles, vocab_size: int
) -> Vocabulary:
    """Turn vocabulary and merges into PowerInfer's lists.

    Args:
        source: the description, already checked.
        tokenizer: the same, loaded.
        files: the settings around it.
        vocab_size: rows of the embedding.

    Raises:
        CheckpointError: an added token in the place of an ordinary one.
    """
    found = {n: (token.encode(), _type(token)) for token, n in source.model["vocab"].items()}
    beyond = place_added(source.file, files.added, found, vocab_size)
    tokens, types = lay_out(found, vocab_size)
    ids = {token: number for number, token in enumerate(tokens)}
    special = {kind: files.special_id(kind, ids) for kind in ("eos", "unk", "pad")}
    bos = tokenizer.bos_id()
    mark_control(types, bos, special["eos"], special["pad"])
    add_bos = tokenizer.adds_bos() or files.add_bos
    return Vocabulary(
        kind=BYTE_LEVEL,
        tokens=tokens,
        types=types,
        scores=[],
        merges=[f"{left} {right}".encode() for left, right in source.merges],
        bos_id=bos,
        eos_id=NONE if special["eos"] is None else special["eos"],
        unk_id=NONE if special["unk"] is None else special["unk"],
        pad_id=NONE if special["pad"] is None else special["pad"],
        add_bos=add_bos,
        differences=tuple(_differences(source, tokenizer)),
        warnings=(*_bos_warning(tokens[bos], add_bos), *beyond),
    )


def _type(token: str) -> int:
    """Return a type with which PowerInfer can print it: normal tokens are spelt in bytes."""
    spelt = _ALPHABET.issuperset(token)
    return int(TokenType.NORMAL if spelt else TokenType.USER_DEFINED)


def _bos_warning(bos: bytes, add_bos: bool | None) -> Iterator[str]:
    if add_bos:
        token = bos.decode("utf-8", "replace")
        yield f"the model's tokenizer puts {token} before a text, PowerInfer does not"


def _differences(source: JsonTokenizer, tokenizer: RustTokenizer) -> Iterator[str]:
    name = pre_tokeniser_name(source.pre_tokenisers)
    if name == "GPT-2":
        yield (
            "PowerInfer splits words only almost as GPT-2 does: not at newlines, punctuation and "
            "quotes inside a text, runs of spaces and its last character"
        )
    else:
        yield f"PowerInfer splits words as GPT-2 does, the model's tokenizer as {name}"
    if any(s["type"] == "ByteLevel" and s.get("add_prefix_space") for s in source.pre_tokenisers):
        yield "the model's tokenizer puts a space before a text, PowerInfer does not"
    if source.model.get("ignore_merges"):
        unreachable = _unreachable(source, tokenizer)
        if unreachable:
            yield f"{unreachable} tokens are found without merges, PowerInfer never finds them"


def _unreachable(source: JsonTokenizer, tokenizer: RustTokenizer) -> int:
    """Count tokens that their own text does not merge to."""
    added = {token["content"] for token in source.document.get("added_tokens", ())}
    vocab = {t: n for t, n in source.model["vocab"].items() if t not in added}
    merged = tokenizer.merge(vocab)
    return sum(ids != [n] for ids, n in zip(merged, vocab.values(), strict=True))
