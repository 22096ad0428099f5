"""A vocabulary from tokenizer.json (or vocab.json with merges.txt), as far as an engine can do it.

Byte-level BPE stays what it is; BPE that falls back to bytes becomes pieces with scores.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf import TokenType

from architectures.rust_tokenizer import RustTokenizer, spells_bytes, steps_of
from common.errors import ExportError
from gguf_export.tokens.encoders import BYTE_TOKENS, SPACE
from gguf_export.tokens.layout import lay_out
from gguf_export.tokens.vocabulary import BYTE_LEVEL, BYTE_PIECES, PIECES, POWERINFER, Vocabulary

Step = dict[str, Any]
"""A part of the description: its `type` and the settings of that type."""

_ALPHABET = frozenset(BYTE_TOKENS)


@dataclass(frozen=True)
class _Source:
    """A description in the form of tokenizer.json.

    Attributes:
        file: where it came from.
        document: the description, merges as pairs.
        engine: that is to find its tokens.
    """

    file: Path
    document: Step
    engine: str

    @property
    def model(self) -> Step:
        """Its model: vocabulary and merges."""
        model: Step = self.document["model"]
        return model

    @cached_property
    def byte_level(self) -> bool:
        """Whether texts are spelt in GPT-2's bytes."""
        return spells_bytes(self.document)

    @property
    def unknown(self) -> str | None:
        """The token that stands for what is none; byte-level ones need none."""
        return None if self.byte_level else self.model.get("unk_token")

    def type_of(self, token: str) -> int:
        """Return a token's type; PowerInfer prints normal ones of byte-level BPE by their bytes."""
        if self.byte_level:
            spelt = _ALPHABET.issuperset(token)
            return int(TokenType.NORMAL if spelt else TokenType.USER_DEFINED)
        if token == self.unknown:
            return int(TokenType.UNKNOWN)
        return int(TokenType.BYTE if token.encode() in BYTE_PIECES else TokenType.NORMAL)

    @property
    def pre_tokenisers(self) -> list[Step]:
        """The steps that split texts into words."""
        return list(steps_of(self.document.get("pre_tokenizer"), "pretokenizers"))

    @property
    def normalisers(self) -> list[Step]:
        """The steps that change texts before."""
        return list(steps_of(self.document.get("normalizer"), "normalizers"))

    @property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs by rank; of a pair that occurs twice the last counts, as in `tokenizers`."""
        pairs = [(left, right) for left, right in self.model["merges"]]
        return list(dict.fromkeys(reversed(pairs)))[::-1]

    def refusal(self, reason: str) -> ExportError:
        """Return the error for what a file for the engine cannot hold."""
        return ExportError(
            f"{self.file}: {reason}, which {self.engine} cannot do",
            "use a model with the tokenizer "
            "of LLaMA or GPT-2, or change the file if texts come out the same",
        )

    def check(self) -> None:
        """Refuse what the engine cannot do whatever the vocabulary.

        Raises:
            ExportError: another kind of model, or a step that changes texts.
        """
        kind = self.model["type"]
        if kind != "BPE" and self.engine != POWERINFER:
            raise ExportError(
                f"{self.file}: its model is {kind}, and psp writes BPE alone for {self.engine}",
                "use a model with a BPE tokenizer",
            )
        if kind != "BPE":
            raise self.refusal(f"its model is {kind}, not BPE")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if self.model.get(key):
                raise self.refusal(f"its model has {key} {self.model[key]!r}")
        for step in self.normalisers:
            if self.byte_level or not _marks_spaces(step):
                raise self.refusal(f"its normalizer {step['type']} changes texts")
        if not self.byte_level and not self.model.get("byte_fallback"):
            raise self.refusal("it has neither byte-level tokens nor byte fallback")


def _marks_spaces(step: Step) -> bool:
    """Tell whether a normaliser only turns spaces into U+2581 or puts one in front."""
    if step["type"] == "Prepend":
        return bool(step["prepend"] == SPACE.decode())
    return bool(
        step["type"] == "Replace"
        and step["pattern"] == {"String": " "}
        and step["content"] == SPACE.decode()
    )


def pre_tokeniser_name(steps: list[Step]) -> str:
    """Return whose way of splitting texts into words it is, as far as known by its steps."""
    kinds = [step["type"] for step in steps]
    patterns = [str(s["pattern"].get("Regex", "")) for s in steps if s["type"] == "Split"]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "GPT-2"
    if kinds == ["Punctuation", "ByteLevel", "Digits", "Split"]:
        return "Falcon"
    if kinds == ["Split", "ByteLevel"] and r"\p{N}{1,3}" in patterns[0]:
        return "Llama-3"
    if kinds == ["Split", "ByteLevel"] and re.search(r"\|\s?\\p\{N\}\|", patterns[0]):
        return "Qwen2"
    return "+".join(kinds)


def read_json_vocabulary(tokenizer: RustTokenizer, engine: str = POWERINFER) -> Vocabulary:
    """Turn vocabulary and merges into PowerInfer's lists, which are llama.cpp's.

    How llama.cpp splits texts of byte-level BPE its file says, see `splitting`.

    Args:
        tokenizer: the loaded tokenizer.
        engine: whose ids are told of.

    Raises:
        ExportError: another kind of model, or a step that changes texts.
        CheckpointError: an added token in the place of an ordinary one.
    """
    source = _Source(tokenizer.file, tokenizer.document(), engine)
    source.check()
    vocab: dict[str, int] = source.model["vocab"]
    vocabulary = lay_out(
        tokenizer,
        {number: (token.encode(), source.type_of(token)) for token, number in vocab.items()},
        kind=BYTE_LEVEL if source.byte_level else PIECES,
        unk_id=vocab.get(source.unknown or ""),
    )
    if not source.byte_level:
        ordinary = {t: n for t, n in vocab.items() if n not in tokenizer.files.added}
        differences = (*_inconsistencies(ordinary, source), *_splits(source))
        scores = _scores(vocab, source.merges, len(vocabulary.tokens))
        prefix = any(_prefixes(source))
        return replace(vocabulary, scores=scores, differences=differences, space_prefix=prefix)
    merges = [f"{left} {right}".encode() for left, right in source.merges]
    if engine != POWERINFER:
        return replace(vocabulary, merges=merges)
    warnings = list(vocabulary.warnings)
    if vocabulary.add_bos:
        token = vocabulary.tokens[vocabulary.bos_id].decode("utf-8", "replace")
        warnings.insert(0, f"the model's tokenizer puts {token} before a text, PowerInfer does not")
    return replace(
        vocabulary,
        merges=merges,
        differences=tuple(_spelling_differences(source, tokenizer)),
        warnings=tuple(warnings),
    )


def _spelling_differences(source: _Source, tokenizer: RustTokenizer) -> Iterator[str]:
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


def _unreachable(source: _Source, tokenizer: RustTokenizer) -> int:
    """Count tokens that their own text does not merge to."""
    added = {token["content"] for token in source.document.get("added_tokens", ())}
    vocab = {t: n for t, n in source.model["vocab"].items() if t not in added}
    merged = tokenizer.merge(vocab)
    return sum(ids != [n] for ids, n in zip(merged, vocab.values(), strict=True))


def _scores(vocab: dict[str, int], merges: list[tuple[str, str]], rows: int) -> list[float]:
    """Return scores by which PowerInfer finds what `tokenizers` finds by ranks, as far as it can.

    `tokenizers` merges the pair of the best rank, PowerInfer the pair whose joined token has the
    best score. A token's score is therefore minus the best rank of the merges that make it. Both
    find the same ids if every pair of tokens that joins to a token is a merge, and a token's merges
    follow each other, as in files made from a SentencePiece model.
    """
    scores = [-float(len(merges))] * rows
    for rank, (left, right) in reversed([*enumerate(merges)]):
        scores[vocab[left + right]] = -float(rank)
    return scores


def _inconsistencies(vocab: dict[str, int], source: _Source) -> Iterator[str]:
    """Yield how scores of tokens cannot say what the ranks of pairs say."""
    merges = source.merges
    last: dict[str, int] = {}
    apart = 0
    for rank, (left, right) in enumerate(merges):
        token = left + right
        apart += last.get(token, rank - 1) != rank - 1
        last[token] = rank
    if apart:
        yield f"{apart} of {len(merges)} merges make a token whose other merges rank elsewhere"
    known = set(merges)
    missing = sum(
        token[:at] in vocab and token[at:] in vocab and (token[:at], token[at:]) not in known
        for token in vocab
        for at in range(1, len(token))
    )
    if missing:
        said = f"{missing} pairs join to a token without a merge"
        yield f"{said}, and {source.engine} merges them too"


def _splits(source: _Source) -> Iterator[str]:
    """Yield how texts are prepared otherwise than the engine prepares them."""
    engine = source.engine
    for step in source.pre_tokenisers:
        if step["type"] != "Metaspace":
            yield f"the model's tokenizer splits words by {step['type']}, {engine} does not"
        elif _puts_space(step):
            yield f"a text that starts with a space gets none in front, {engine} adds one"
    if engine == POWERINFER and not any(_prefixes(source)):
        yield "the model's tokenizer puts no space before a text, PowerInfer does"


def _prefixes(source: _Source) -> Iterator[bool]:
    """Yield of each step that may put a space before a text whether it does."""
    yield from (step["type"] == "Prepend" for step in source.normalisers)
    yield from (_puts_space(s) for s in source.pre_tokenisers if s["type"] == "Metaspace")


def _puts_space(metaspace: Step) -> bool:
    return bool(metaspace.get("prepend_scheme", "always") != "never")
