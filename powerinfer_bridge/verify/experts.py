"""A file of arch `smallthinker` with one expert against its checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from gguf import GGUFValueType
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from architectures.gguf_model.byte_level import puts_bos
from architectures.gguf_model.source import GGUFSource
from architectures.model import LoadedModel, load_model
from common.errors import EXPORT_AGAIN, EngineError, FormatError
from gguf_export.contract import OpenedFile, Report
from gguf_export.pwri.schema import HEAD
from gguf_export.smallthinker.contract import RUNNABLE, ExpertFile
from gguf_export.smallthinker.hyperparameters import is_transposed
from gguf_export.smallthinker.requirements import check_one_expert
from gguf_export.smallthinker.second_engine import stored_neurons
from gguf_export.tokens.model_vocabulary import read_vocabulary
from gguf_export.tokens.splitting import PRE_KEY, splitting_name, splitting_note
from gguf_export.tokens.vocabulary import ADD_BOS_KEY, BYTE_LEVEL, Vocabulary
from gguf_files.names import DENSE_DOWN, PROFILER, expert_name
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.expert import ExpertEngine
from powerinfer_bridge.engine.perplexity import engine_perplexity, perplexity, perplexity_windows
from powerinfer_bridge.verify.comparison import (
    EXACT,
    LEAST_CONTEXT,
    LOGIT_TOLERANCE,
    check_fingerprint,
    compared_text,
    json_number,
    keeps_numbers,
    require_sizes,
)
from powerinfer_bridge.verify.tokens import require_vocabulary, same_ids

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from gguf_files.reader import GGUFFile

_BLOCK, _NEAR = 32, 1.25
"""Of Q4_0: numbers that are rounded together, and by how many steps one may be off: by half a step,
by a whole one at the end that 4 bits lack, and by what a mean over rows does not tell."""

_PPL_TOLERANCE = 5e-3
"""Largest relative difference from transformers' perplexity where weights are not rounded further:
float16 alone took 0.14 % of a SmolLM2 over four windows."""


def check_expert_model(report: Report, opened: ExpertFile, checkpoint: Checkpoint) -> None:
    """Compare sizes, tensors and tokens of a file with those of its checkpoint."""
    report.check("model fingerprint", lambda: check_fingerprint(opened.file, checkpoint), "file")
    report.check("model sizes", lambda: _sizes(opened, checkpoint), "keys", "tokenizer")
    report.check("model tensors", lambda: _same_tensors(opened, checkpoint), "shapes")
    report.check("model tokenizer", lambda: same_tokens(opened, checkpoint), "tokenizer")


def check_expert_numbers(
    report: Report, opened: ExpertFile, checkpoint: Checkpoint, context: int, chunks: int
) -> None:
    """Run both models and compare; figures go to the report (settings: `verification.verify`)."""
    numbers = _Numbers(opened, checkpoint, context, report.figures)
    ready = (*RUNNABLE, "model sizes")
    report.check("logits", numbers.logits, *ready)
    report.check("perplexity", lambda: numbers.perplexity(chunks), *ready)


def _sizes(opened: ExpertFile, checkpoint: Checkpoint) -> str:
    check_one_expert(checkpoint, "--model")
    shape = checkpoint.shape
    turned = is_transposed(opened.file)
    require_sizes(opened, checkpoint, stored_neurons(shape.d_model, shape.d_ff) if turned else None)
    return f"sizes and constants of {checkpoint.architecture.name}"


def _same_tensors(opened: ExpertFile, checkpoint: Checkpoint) -> str:
    """Compare all tensors but routers bit by bit, one in memory at a time."""
    turned = is_transposed(opened.file)
    count = 0
    for rule, target in tqdm(list(checkpoint.architecture.exported), desc="compare", disable=None):
        for layer in range(checkpoint.shape.n_layers if rule.per_layer else 1):
            name = expert_name(target).format(layer=layer)
            if name not in opened.file.tensors:
                continue  # a head that is the embedding
            expected, found = checkpoint.read(rule, layer), opened.file.tensor(name)
            if turned and f".{DENSE_DOWN}_exps." in name:
                expected = expected.T
            matrix = found.reshape(found.shape[-expected.dim() :])  # without that of experts
            found = matrix[: len(expected)]
            if matrix[len(expected) :].any():
                raise FormatError(f"tensor {name} has neurons that the model has not", EXPORT_AGAIN)
            if not same_numbers(opened.file, name, expected.contiguous(), found):
                raise FormatError(f"tensor {name} differs from the model's", EXPORT_AGAIN)
            opened.file.forget()
            count += 1
    return f"{count} are the model's, to the bit or rounded to their types"


def same_numbers(
    file: GGUFFile, name: str, expected: torch.Tensor, found: npt.NDArray[Any]
) -> bool:
    """Tell whether a tensor's numbers are the model's; a head with a predictor has a level too."""
    if name == HEAD and PROFILER in file.tensors:
        numbers = torch.from_numpy(found)
        return _near(expected + _common(expected, numbers), numbers)
    return keeps_numbers(expected, found, file.tensors[name].kind)


def _common(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return what a head's predictor added to all rows of it, (d_model,) float32, nearly."""
    return (found.float() - expected.float()).mean(0)


def _near(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether Q4_0 numbers are those of which `expected` is known but for a little."""
    blocks = found.float().reshape(-1, _BLOCK)
    steps = blocks.abs().amax(1, keepdim=True) / 8
    apart = (blocks - expected.float().reshape(-1, _BLOCK)).abs()
    return bool((apart <= _NEAR * steps).all())


def same_tokens(opened: OpenedFile, checkpoint: Checkpoint) -> str:
    """Demand the model's vocabulary, its ids or the name of how it splits texts, and its BOS."""
    rows = len(opened.vocabulary.tokens)
    expected = read_vocabulary(checkpoint.directory, rows, checkpoint.config, engine=opened.engine)
    require_vocabulary(opened.vocabulary, expected)
    _same_bos(opened, expected)
    if opened.vocabulary.kind != BYTE_LEVEL:
        return same_ids(opened, checkpoint, compared_text())
    found = opened.file.optional(PRE_KEY, GGUFValueType.STRING, None)
    origin, wanted = checkpoint.origin, None
    if isinstance(origin, GGUFSource):
        wanted = origin.file.optional(PRE_KEY, GGUFValueType.STRING, None)
    wanted = wanted or splitting_name(checkpoint, expected)
    if wanted != found:
        raise FormatError(f"{PRE_KEY} is {found!r}, expected {wanted!r}", EXPORT_AGAIN)
    note = splitting_note(checkpoint, expected)
    return f"the model's vocabulary; {note or f'llama.cpp splits texts as {found}'}"


def _same_bos(opened: OpenedFile, expected: Vocabulary) -> None:
    """Demand BOS before a text unless the model says that there is none."""
    found, wanted = opened.vocabulary.add_bos, expected.add_bos is not False
    if found is None:
        pre = opened.file.optional(PRE_KEY, GGUFValueType.STRING, "")
        found = expected.kind != BYTE_LEVEL or puts_bos(pre)
    if found != wanted:
        said, told = ("BOS" if each else "no BOS" for each in (found, wanted))
        raise FormatError(
            f"{ADD_BOS_KEY}: {opened.engine} puts {said} before a text of this file, expected "
            f"{told}",
            EXPORT_AGAIN,
        )


@dataclass(frozen=True)
class _Numbers:
    """The file's numbers against its model's, both with ReLU: the graph has no FATReLU."""

    opened: ExpertFile
    checkpoint: Checkpoint
    longest: int
    figures: dict[str, float | None]

    @cached_property
    def context(self) -> int:
        """Tokens of a window."""
        context = min(self.longest, self.opened.hyper.context_length)
        if context < LEAST_CONTEXT:
            raise EngineError(f"windows of {context} tokens tell nothing", "pass at least 8")
        return context

    @cached_property
    def engine(self) -> ExpertEngine:
        return ExpertEngine(self.opened.path)

    @cached_property
    def exact(self) -> bool:
        """Whether no weight is rounded by more than float16 does."""
        return all(info.kind in EXACT for info in self.opened.file.tensors.values())

    @cached_property
    def model(self) -> LoadedModel:
        shape = self.checkpoint.shape
        if shape.activation == "fatrelu":
            shape = replace(shape, activation="relu", activation_threshold=0.0)
        return load_model(replace(self.checkpoint, shape=shape), dtype=torch.float32, device="cpu")

    def _reference(self, ids: list[int]) -> torch.Tensor:
        """Return transformers' logits (tokens, vocab_size) in float32."""
        return self.model.logits(torch.tensor([ids]))[0]

    def logits(self) -> str:
        """Judge the logits of a window."""
        ids = self.opened.vocabulary.text_ids(compared_text())[: self.context]
        expected = self._reference(ids)
        found = self.engine.forward(ids, KVCache(self.engine.hyper.n_layers))
        largest, spread = float((found - expected).abs().max()), float(expected.std())
        self.figures["logit_spread"] = json_number(spread)
        self.figures["logit_difference_dense"] = json_number(largest)
        if not math.isfinite(largest + spread):
            raise EngineError("logits are not all finite", "the weights are unusable")
        line = f"largest difference {largest:.4g}, spread {spread:.4g}, {len(ids)} tokens"
        if not self.exact:
            return f"{line}; not judged: the weights are quantised"
        if not largest <= LOGIT_TOLERANCE * spread:
            raise EngineError(f"{line}: more than {LOGIT_TOLERANCE:.0%}", EXPORT_AGAIN)
        return f"{line}; at most {LOGIT_TOLERANCE:.0%} of it"

    def perplexity(self, chunks: int) -> str:
        """Compare the perplexity of a text, and judge it where no weight is rounded."""
        ours = engine_perplexity(self.engine, compared_text(), self.context, chunks, "file")
        theirs = perplexity(self._reference, self._windows(chunks), "transformers")
        told = {"ppl_dense": json_number(ours), "ppl_transformers": json_number(theirs)}
        self.figures.update(told)
        line = f"{ours:.4f}, transformers {theirs:.4f} ({ours / theirs - 1:+.3%})"
        if not self.exact:
            return f"{line}; not judged: the weights are quantised"
        if not abs(ours / theirs - 1) <= _PPL_TOLERANCE:
            raise EngineError(f"{line}: more than {_PPL_TOLERANCE:.1%} apart", EXPORT_AGAIN)
        return f"{line}; at most {_PPL_TOLERANCE:.1%} apart"

    def _windows(self, chunks: int) -> Iterator[tuple[list[int], list[int]]]:
        vocabulary = self.opened.vocabulary
        ids = vocabulary.text_ids(compared_text().removesuffix("\n"))
        return perplexity_windows(ids, vocabulary.bos, self.context, chunks)
