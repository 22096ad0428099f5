"""What a file and its model compute of the same text, and how far that may be apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from gguf import GGMLQuantizationType

from architectures.checkpoint import Checkpoint
from common.documents import sample_text
from common.errors import EXPORT_AGAIN, EngineError
from gguf_export.contract import OpenedFile
from powerinfer_bridge.engine.perplexity import perplexity, perplexity_windows

LOGIT_TOLERANCE = 0.05
"""Largest difference between the engine's and transformers' logits, in standard deviations of the
latter. Rounding to float16 stays well below; a wrong tensor, size or constant is far above."""

_EXACT = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
"""Types that keep the logits within the tolerance; others are compared tensor by tensor only."""

_CHARACTERS = 20_000
_LEAST_CONTEXT = 8

NOT_JUDGED = "not judged: the weights are quantised"


def compared_text() -> str:
    """Return what both models read."""
    return sample_text()[:_CHARACTERS]


def relu_form(checkpoint: Checkpoint) -> Checkpoint:
    """Return what the programs compute of a model: FATReLU without its shift, else itself."""
    if checkpoint.shape.activation != "fatrelu":
        return checkpoint
    shape = replace(checkpoint.shape, activation="relu", activation_threshold=0.0)
    return replace(checkpoint, shape=shape)


@dataclass(frozen=True)
class Compared:
    """A file and its model, and the text that both read.

    Attributes:
        opened: the file.
        checkpoint: its model, of the same sizes.
        longest: window of logits and perplexity, tokens; at most the model's context.
        chunks: perplexity windows, at most.
        figures: take what is measured.
    """

    opened: OpenedFile
    checkpoint: Checkpoint
    longest: int
    chunks: int
    figures: dict[str, float | None]

    @cached_property
    def context(self) -> int:
        """Tokens of a window.

        Raises:
            EngineError: so few that they tell nothing.
        """
        context = min(self.longest, self.checkpoint.shape.context_length)
        if context < _LEAST_CONTEXT:
            raise EngineError(f"windows of {context} tokens tell nothing", "pass at least 8")
        return context

    @cached_property
    def ids(self) -> list[int]:
        """The first window's ids, BOS included."""
        return self.opened.vocabulary.text_ids(compared_text())[: self.context]

    @cached_property
    def windows(self) -> list[tuple[list[int], list[int]]]:
        """Those of perplexity; see `perplexity_windows`."""
        vocabulary = self.opened.vocabulary
        ids = vocabulary.text_ids(compared_text().removesuffix("\n"))
        return list(perplexity_windows(ids, vocabulary.bos, self.context, self.chunks))

    def perplexity_of(self, logits: Iterable[torch.Tensor], name: str) -> float:
        """Return the perplexity of `windows` by the logits of each, in their order."""
        found: Iterator[torch.Tensor] = iter(logits)
        return perplexity(lambda ids: next(found), iter(self.windows), name)

    @cached_property
    def exact(self) -> bool:
        """Whether no weight is rounded by more than float16 does."""
        return all(info.kind in _EXACT for info in self.opened.file.tensors.values())

    def differ(self, name: str, found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
        """Return the largest difference of logits and the spread of the expected ones.

        Raises:
            EngineError: one is no finite number.
        """
        largest, spread = float((found - expected).abs().max()), float(expected.std())
        self.figures["logit_spread"] = json_number(spread)
        self.figures[f"logit_difference_{name}"] = json_number(largest)
        if not math.isfinite(largest + spread):
            raise EngineError(f"{name} logits are not all finite", "the weights are unusable")
        return largest, spread

    def judge_logits(self, found: torch.Tensor, expected: torch.Tensor) -> str:
        """Judge the logits of all neurons, (tokens, vocab_size), where no weight is quantised.

        Raises:
            EngineError: they are too far apart.
        """
        largest, spread = self.differ("dense", found, expected)
        line = f"largest difference {largest:.4g}, spread {spread:.4g}, {len(found)} tokens"
        if not self.exact:
            return f"{line}; {NOT_JUDGED}"
        if not largest <= LOGIT_TOLERANCE * spread:
            raise EngineError(f"{line}: more than {LOGIT_TOLERANCE:.0%}", EXPORT_AGAIN)
        return f"{line}; at most {LOGIT_TOLERANCE:.0%} of it"

    def judge_perplexity(
        self, ours: float, theirs: float, whose: str, tolerance: float, bound: float | None
    ) -> str:
        """Judge the file's perplexity by its model's.

        Args:
            ours: the file's.
            theirs: the model's.
            whose: that is, for the line.
            tolerance: largest relative difference where no weight is quantised.
            bound: what the user allows it to be more, a fraction, whatever the weights are.

        Raises:
            EngineError: they are too far apart, or no finite numbers.
        """
        gap = ours / theirs - 1
        self.figures["ppl_dense"], self.figures["ppl_gap"] = json_number(ours), json_number(gap)
        line = f"{ours:.4f}, {whose} {theirs:.4f} ({gap:+.3%})"
        if not math.isfinite(gap):
            raise EngineError(f"{line}: no finite number", "the weights are unusable")
        if self.exact and not abs(gap) <= tolerance:
            raise EngineError(f"{line}: more than {tolerance:.1%} apart", EXPORT_AGAIN)
        if bound is not None and not gap <= bound:
            raise EngineError(f"{line}: above {bound:.3%}", "export a finer type or allow more")
        judged = [f"at most {tolerance:.1%} apart"] if self.exact else []
        judged += [] if bound is None else [f"at most {bound:.3%} more"]
        return f"{line}; {' and '.join(judged) or NOT_JUDGED}"


def json_number(number: float) -> float | None:
    """Return a number as JSON has it, None for what it has not."""
    return number if math.isfinite(number) else None
