"""An exported file against the checkpoint that it was made from: tensors, tokenizer, numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from gguf import GGUFValueType
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from architectures.model import load_model
from architectures.spec import ModelShape, TensorRule
from architectures.tokenizer import load_tokenizer
from common.errors import EngineError, FormatError
from gguf_export.reader import GGUFFile
from gguf_export.schema import DENSE_THRESHOLD
from powerinfer_bridge.contract import RUNNABLE, Report, Subject
from powerinfer_bridge.engine import KVCache
from powerinfer_bridge.perplexity import engine_perplexity
from powerinfer_bridge.sample_text import sample_text

LOGIT_TOLERANCE = 0.05
"""Largest difference between the engine's and transformers' logits, in standard deviations of the
latter. Rounding to float16 stays well below; a wrong tensor, size or constant is far above."""

_CHARACTERS = 20_000
_LEAST_CONTEXT = 8
_MODEL_KEY = "psp.model_fingerprint"
_MIXED = (
    "def f(x):\n\treturn [y ** 2 for y in x]  # naïve Café\r\n   three spaces, 中文字符 и кириллица"
    ", 😀👩\u200d👧 emoji \x01\x07\x1b[0m\x7f control, e\u0301 \ufeff\ufffd \n\n    trailing  "
)


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Settings of a comparison.

    Attributes:
        max_ppl_gap: largest perplexity gap that passes, a fraction; None judges none.
        context: window of logits and perplexity, tokens; at most the model's context.
        chunks: perplexity windows, at most.
    """

    max_ppl_gap: float | None
    context: int
    chunks: int


def check_model(
    report: Report, subject: Subject, checkpoint: Checkpoint, settings: CompareSettings
) -> None:
    """Compare a file with the checkpoint that it was made from; figures go to the report."""
    text, ready = sample_text()[:_CHARACTERS], (*RUNNABLE, "model sizes")
    report.check("model fingerprint", lambda: _fingerprint(subject.file, checkpoint), "file")
    report.check("model sizes", lambda: _sizes(subject, checkpoint), "keys", "tokenizer")
    report.check("model tensors", lambda: _same_tensors(subject.file, checkpoint), "layout")
    report.check("model tokenizer", lambda: _same_ids(subject, checkpoint, text), "tokenizer")
    comparison = _Comparison(subject, checkpoint, settings, text, report.figures)
    report.check("dense logits", comparison.dense, *ready)
    report.check("sparse logits", comparison.sparse, *ready)
    report.check("perplexity gap", comparison.gap, *ready)


def _fingerprint(file: GGUFFile, checkpoint: Checkpoint) -> str:
    if file.value(_MODEL_KEY, GGUFValueType.STRING) != checkpoint.fingerprint:
        raise FormatError(f"{_MODEL_KEY} is another model's; pass the --model it was made from")
    return "the file was made from this model"


def _sizes(subject: Subject, checkpoint: Checkpoint) -> str:
    hyper, shape = subject.hyper, checkpoint.shape
    architecture = subject.file.value("general.architecture", GGUFValueType.STRING)
    pairs: list[tuple[str, Any, Any]] = [
        ("architecture", architecture, checkpoint.architecture.gguf_name),
        ("vocabulary", len(subject.vocabulary.tokens), shape.vocab_size),
        ("ReLU on both halves", hyper.up_activated, shape.activation == "drelu"),
    ]
    sizes = ("d_model", "d_ff", "n_layers", "n_heads", "n_kv_heads", "context_length")
    pairs += [(key, getattr(hyper, key), getattr(shape, key)) for key in sizes]
    for name, found, expected in pairs:
        if found != expected:
            raise FormatError(f"{name} is {found}, the model has {expected}; export it again")
    for name in ("norm_eps", "rope_theta", "activation_threshold"):
        found, expected = getattr(hyper, name), getattr(shape, name)
        if not math.isclose(found, expected, rel_tol=1e-6):  # float32 in the file
            raise FormatError(f"{name} is {found:g}, the model has {expected:g}; export it again")
    return f"sizes and constants of {checkpoint.architecture.name}"


def _same_tensors(file: GGUFFile, checkpoint: Checkpoint) -> str:
    """Compare all tensors but predictors bit by bit, one in memory at a time."""
    targets = tqdm(list(_targets(checkpoint)), unit="tensor", desc="compare", disable=None)
    for rule, layer, name in targets:
        found = file.tensor(name)
        expected = _laid_out(checkpoint.read(rule, layer), rule, checkpoint.shape)
        expected = expected.float() if expected.dim() == 1 else expected.half()
        if not np.array_equal(found, expected.contiguous().numpy()):
            raise FormatError(f"tensor {name} differs from the model's; export it again")
    return f"{len(targets)} equal the model's to the bit, rounded to F16"


def _targets(checkpoint: Checkpoint) -> Iterator[tuple[TensorRule, int, str]]:
    for rule in checkpoint.architecture.tensors:
        if rule.target is None:
            family = checkpoint.architecture.name
            raise FormatError(f"family {family} has no export; pass the model of the file")
        for layer in range(checkpoint.shape.n_layers if rule.per_layer else 1):
            yield rule, layer, rule.target.format(layer=layer)


def _laid_out(weight: torch.Tensor, rule: TensorRule, shape: ModelShape) -> torch.Tensor:
    """Return a checkpoint's tensor in the file's layout, told row by row."""
    if rule.transform == "transpose":
        return weight.T
    if rule.transform == "none":
        return weight
    # Row 2i + c of a head is the i-th of its half c: ggml's RoPE turns neighbours.
    half = shape.head_dim // 2
    order = torch.tensor([half * (row % 2) + row // 2 for row in range(shape.head_dim)])
    heads = torch.arange(len(weight) // shape.head_dim) * shape.head_dim
    return weight[(heads[:, None] + order).reshape(-1)]


def _same_ids(subject: Subject, checkpoint: Checkpoint, text: str) -> str:
    shape, vocabulary = checkpoint.shape, subject.vocabulary
    reference = load_tokenizer(checkpoint.path, shape.vocab_size, checkpoint.config)
    if vocabulary.bos_id != reference.bos_id():
        raise FormatError(f"BOS is {vocabulary.bos_id}, the model's is {reference.bos_id()}")
    count = 0
    for part in (text, _MIXED):
        ours, theirs = vocabulary.encode(part), reference.encode(part)
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            same = next((at for at, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            raise FormatError(f"token ids differ from the model's after {same} equal ones")
        count += len(ours)
    return f"{count} ids equal the model's, prose and mixed scripts"


@dataclass(frozen=True)
class _Comparison:
    """The file's numbers against its model's, both with ReLU: FATReLU is not PowerInfer's."""

    subject: Subject
    checkpoint: Checkpoint
    settings: CompareSettings
    text: str
    figures: dict[str, float | None]

    @cached_property
    def context(self) -> int:
        """Tokens of a window."""
        context = min(self.settings.context, self.subject.hyper.context_length)
        if context < _LEAST_CONTEXT:
            raise EngineError(f"windows of {context} tokens tell nothing; pass at least 8")
        return context

    @cached_property
    def ids(self) -> list[int]:
        vocabulary = self.subject.vocabulary
        return [vocabulary.bos_id, *vocabulary.encode(self.text)][: self.context]

    @cached_property
    def reference(self) -> torch.Tensor:
        """Transformers' logits (tokens, vocab_size) in float32."""
        shape = self.checkpoint.shape
        if shape.activation == "fatrelu":
            shape = replace(shape, activation="relu", activation_threshold=0.0)
        model = load_model(replace(self.checkpoint, shape=shape), dtype=torch.float32, device="cpu")
        return model.logits(torch.tensor([self.ids]))[0]

    def _logits(self, threshold: float) -> torch.Tensor:
        engine = self.subject.engine.with_threshold(threshold)
        return engine.forward(self.ids, KVCache(engine.hyper.n_layers))

    def _difference(self, name: str, logits: torch.Tensor) -> tuple[float, float]:
        """Return the largest difference from the reference and the reference's spread."""
        largest = float((logits - self.reference).abs().max())
        spread = float(self.reference.std())
        self.figures["logit_spread"] = _json_number(spread)
        self.figures[f"logit_difference_{name}"] = _json_number(largest)
        if not math.isfinite(largest + spread):
            raise EngineError(f"{name} logits are not all finite; the weights are unusable")
        return largest, spread

    def dense(self) -> str:
        """Judge the logits of all neurons."""
        _ = self.reference  # first: its weights are dropped before the engine's fill memory
        largest, spread = self._difference("dense", self._logits(DENSE_THRESHOLD))
        line = f"largest difference {largest:.4g}, spread {spread:.4g}"
        if not largest <= LOGIT_TOLERANCE * spread:
            raise EngineError(f"{line}: more than {LOGIT_TOLERANCE:.0%}; export the file again")
        return f"{line}, {len(self.ids)} tokens; at most {LOGIT_TOLERANCE:.0%} of it"

    def sparse(self) -> str:
        """Report how far predictors move the logits; only what is no number fails."""
        logits = self._logits(self.subject.hyper.threshold)
        largest, spread = self._difference("sparse", logits)
        same = float((logits.argmax(-1) == self.reference.argmax(-1)).double().mean())
        return (
            f"largest difference {largest:.4g}, spread {spread:.4g}, "
            f"likeliest token equal in {same:.1%}; not judged"
        )

    def gap(self) -> str:
        """Report the perplexity gap, and judge it where a bound is given."""
        thresholds = {"dense": DENSE_THRESHOLD, "sparse": self.subject.hyper.threshold}
        ppl = {name: self._perplexity(name, number) for name, number in thresholds.items()}
        gap = ppl["sparse"] / ppl["dense"] - 1
        self.figures.update({f"ppl_{name}": _json_number(ppl[name]) for name in ppl})
        self.figures["ppl_gap"] = _json_number(gap)
        bound = self.settings.max_ppl_gap
        line = f"{gap:+.3%} ({ppl['dense']:.4f} dense, {ppl['sparse']:.4f} sparse)"
        if not math.isfinite(gap):
            raise EngineError(f"{line}: no finite number; the weights are unusable")
        if bound is not None and not gap <= bound:
            raise EngineError(f"{line}: above {bound:.3%}; train better predictors or allow more")
        return line + (", not judged" if bound is None else f", at most {bound:.3%}")

    def _perplexity(self, name: str, threshold: float) -> float:
        engine = self.subject.engine.with_threshold(threshold)
        return engine_perplexity(engine, self.text, self.context, self.settings.chunks, name)


def _json_number(number: float) -> float | None:
    return number if math.isfinite(number) else None
