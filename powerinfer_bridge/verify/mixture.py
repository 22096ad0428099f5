"""A file of arch `smallthinker` with several experts against its checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from architectures.model import LoadedModel, load_model
from common.errors import EXPORT_AGAIN, EngineError, FormatError
from gguf_export.contract import Report
from gguf_export.pwri.schema import HEAD
from gguf_export.smallthinker.hyperparameters import is_transposed
from gguf_export.smallthinker.mixture import check_mixture, mixture_tensors
from gguf_export.smallthinker.mixture_contract import MixtureFile
from powerinfer_bridge.engine.perplexity import perplexity, perplexity_windows
from powerinfer_bridge.verify.comparison import (
    EXACT,
    LEAST_CONTEXT,
    check_fingerprint,
    compared_text,
    json_number,
)
from powerinfer_bridge.verify.experts import same_numbers, same_tokens

_RUNNABLE = ("keys", "tokenizer", "tensor set", "shapes", "types", "model sizes")
_PPL_TOLERANCE = 1e-2
"""Largest relative difference of perplexities where weights are rounded to float16 at most: a token
whose experts are nearly equal to its router may get another one."""


def check_mixture_model(report: Report, opened: MixtureFile, checkpoint: Checkpoint) -> None:
    """Compare sizes, tensors and tokens of a file with those of its checkpoint."""
    report.check("model fingerprint", lambda: check_fingerprint(opened.file, checkpoint), "file")
    report.check("model sizes", lambda: _sizes(opened, checkpoint), "keys", "tokenizer")
    needed = ("shapes", "model sizes")
    report.check("model tensors", lambda: _same_tensors(opened, checkpoint), *needed)
    report.check("model tokenizer", lambda: same_tokens(opened, checkpoint), "tokenizer")


def check_mixture_numbers(
    report: Report, opened: MixtureFile, checkpoint: Checkpoint, context: int, chunks: int
) -> None:
    """Run both and compare; figures go to the report (settings: `verification.verify`)."""
    numbers = _Numbers(opened, checkpoint, context, report.figures)
    report.check("perplexity", lambda: numbers.perplexity(chunks), *_RUNNABLE)


def _sizes(opened: MixtureFile, checkpoint: Checkpoint) -> str:
    """Demand a model of the same sizes, constants and layouts, as far as windows matter."""
    if checkpoint.shape.experts is None:
        family = checkpoint.architecture.name
        raise FormatError(f"the model is a {family}, no mixture of experts", "pass its model")
    check_mixture(checkpoint)
    found, expected = opened.model.shape.facts(), checkpoint.shape.facts()
    for facts in (found, expected):
        facts["attention"].pop("window")  # in the programs 4096, see `check_mixture`
        facts.pop("tied_embeddings")  # a head's predictor brings a head of its own
        facts["norm_eps"], facts["rope_theta"] = (
            float(f"{facts[key]:.6g}") for key in ("norm_eps", "rope_theta")
        )
    for key, value in expected.items():
        if found[key] != value:
            raise FormatError(f"{key} is {found[key]}, the model has {value}", EXPORT_AGAIN)
    return f"sizes and constants of {checkpoint.architecture.name}"


def _same_tensors(opened: MixtureFile, checkpoint: Checkpoint) -> str:
    """Compare all tensors bit by bit, one in memory at a time."""
    turned, file = is_transposed(opened.file), opened.file
    planned = list(mixture_tensors(checkpoint, transposed=turned, own_head=HEAD in file.tensors))
    for tensor in tqdm(planned, desc="compare", disable=None):
        expected, found = tensor.read(), file.tensor(tensor.name)
        found = found.reshape(tuple(expected.shape))
        if not same_numbers(file, tensor.name, expected.contiguous(), found):
            raise FormatError(f"tensor {tensor.name} differs from the model's", EXPORT_AGAIN)
        file.forget()
    return f"{len(planned)} are the model's, to the bit or rounded to their types"


@dataclass(frozen=True)
class _Numbers:
    """The file's numbers against its model's, both in the same graph."""

    opened: MixtureFile
    checkpoint: Checkpoint
    longest: int
    figures: dict[str, float | None]

    @cached_property
    def context(self) -> int:
        """Tokens of a window."""
        context = min(self.longest, self.checkpoint.shape.context_length)
        if context < LEAST_CONTEXT:
            raise EngineError(f"windows of {context} tokens tell nothing", "pass at least 8")
        return context

    def perplexity(self, chunks: int) -> str:
        """Compare the perplexity of a text, and judge it where no weight is quantised."""
        ours, theirs = (
            self._perplexity(load_model(model, dtype=torch.float32, device="cpu"), chunks, name)
            for model, name in ((self.opened.model, "file"), (self.checkpoint, "model"))
        )
        self.figures["ppl_dense"], self.figures["ppl_model"] = map(json_number, (ours, theirs))
        if not math.isfinite(ours + theirs):
            raise EngineError("perplexities are not finite", "the weights are unusable")
        line = f"{ours:.4f}, the model {theirs:.4f} ({ours / theirs - 1:+.3%})"
        if not all(info.kind in EXACT for info in self.opened.file.tensors.values()):
            return f"{line}; not judged: the weights are quantised"
        if not abs(ours / theirs - 1) <= _PPL_TOLERANCE:
            raise EngineError(f"{line}: more than {_PPL_TOLERANCE:.0%} apart", EXPORT_AGAIN)
        return f"{line}; at most {_PPL_TOLERANCE:.0%} apart"

    def _perplexity(self, model: LoadedModel, chunks: int, name: str) -> float:
        vocabulary = self.opened.vocabulary
        ids = vocabulary.text_ids(compared_text().removesuffix("\n"))
        windows = perplexity_windows(ids, vocabulary.bos, self.context, chunks)
        return perplexity(lambda window: model.logits(torch.tensor([window]))[0], windows, name)
