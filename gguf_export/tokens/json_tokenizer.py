"""What a tokenizer.json says beyond its vocabulary, and what of it PowerInfer cannot do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ExportError

_SPACE = "\u2581"


@dataclass(frozen=True)
class JsonTokenizer:
    """A description in the form of tokenizer.json.

    Attributes:
        file: where it came from.
        document: the description, merges as pairs.
    """

    file: Path
    document: dict[str, Any]

    @property
    def model(self) -> dict[str, Any]:
        """Its model: vocabulary and merges."""
        model: dict[str, Any] = self.document["model"]
        return model

    @property
    def byte_level(self) -> bool:
        """Whether texts are spelt in GPT-2's bytes."""
        return any(step["type"] == "ByteLevel" for step in self.pre_tokenisers)

    @property
    def pre_tokenisers(self) -> list[dict[str, Any]]:
        """The steps that split texts into words."""
        return list(_steps(self.document.get("pre_tokenizer"), "pretokenizers"))

    @property
    def normalisers(self) -> list[dict[str, Any]]:
        """The steps that change texts before."""
        return list(_steps(self.document.get("normalizer"), "normalizers"))

    @property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs by rank; of a pair that occurs twice the last counts, as in `tokenizers`."""
        pairs = [(left, right) for left, right in self.model["merges"]]
        return list(dict.fromkeys(reversed(pairs)))[::-1]

    def refusal(self, reason: str) -> ExportError:
        """Return the error for what a file for PowerInfer cannot hold."""
        return ExportError(
            f"{self.file}: {reason}, which PowerInfer cannot do",
            "use a model with the tokenizer "
            "of LLaMA or GPT-2, or change the file if texts come out the same",
        )

    def check(self) -> None:
        """Refuse what PowerInfer cannot do whatever the vocabulary.

        Raises:
            ExportError: another kind of model, or a step that changes texts.
        """
        kind = self.model["type"]
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


def _steps(step: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    if step is None:
        return
    if step["type"] == "Sequence":
        for part in step[inner]:
            yield from _steps(part, inner)
    else:
        yield step


def _marks_spaces(step: dict[str, Any]) -> bool:
    """Tell whether a normaliser only turns spaces into U+2581 or puts one in front."""
    if step["type"] == "Prepend":
        return bool(step["prepend"] == _SPACE)
    return bool(
        step["type"] == "Replace"
        and step["pattern"] == {"String": " "}
        and step["content"] == _SPACE
    )


def pre_tokeniser_name(steps: list[dict[str, Any]]) -> str:
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
