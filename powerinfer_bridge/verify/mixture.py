"""A file of arch `smallthinker` with several experts against its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from architectures.model import LoadedModel, load_model
from common.errors import EXPORT_AGAIN, FormatError
from gguf_export.contract import Report
from gguf_export.pwri.schema import HEAD
from gguf_export.smallthinker.contract import RUNNABLE
from gguf_export.smallthinker.hyperparameters import is_transposed
from gguf_export.smallthinker.mixture import check_mixture, mixture_tensors
from gguf_export.smallthinker.mixture_contract import MixtureFile
from powerinfer_bridge.verify.comparison import check_fingerprint
from powerinfer_bridge.verify.experts import same_tokens
from powerinfer_bridge.verify.numbers import Compared, json_number
from powerinfer_bridge.verify.tensors import same_numbers

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
    report: Report,
    opened: MixtureFile,
    checkpoint: Checkpoint,
    context: int,
    chunks: int,
    max_ppl_gap: float | None,
) -> None:
    """Run both and compare; figures go to the report (settings: `verification.verify`)."""
    numbers = _Numbers(opened, checkpoint, context, chunks, report.figures)
    report.check("perplexity", lambda: numbers.perplexity(max_ppl_gap), *RUNNABLE, "model sizes")


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
        if not same_numbers(file, tensor.name, tensor.read().contiguous()):
            raise FormatError(f"tensor {tensor.name} differs from the model's", EXPORT_AGAIN)
        file.forget()
    return f"{len(planned)} are the model's, to the bit or rounded to their types"


@dataclass(frozen=True)
class _Numbers(Compared):
    """The file's numbers against its model's, both in the same graph."""

    opened: MixtureFile

    def perplexity(self, bound: float | None) -> str:
        """Compare the perplexity of a text, and judge it."""
        ours, theirs = (
            self._perplexity(load_model(model, dtype=torch.float32, device="cpu"), name)
            for model, name in ((self.opened.model, "file"), (self.checkpoint, "model"))
        )
        self.figures["ppl_model"] = json_number(theirs)
        return self.judge_perplexity(ours, theirs, "the model", _PPL_TOLERANCE, bound)

    def _perplexity(self, model: LoadedModel, name: str) -> float:
        logits = (model.logits(torch.tensor([ids]))[0] for ids, _ in self.windows)
        return self.perplexity_of(logits, name)
