"""An exported file against the checkpoint that it was made from: tensors, tokenizer, numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from gguf import GGUFValueType
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from architectures.model import load_model
from architectures.rope import RopeScaling
from architectures.spec import ModelShape, TensorRule
from common.errors import EXPORT_AGAIN, EngineError, FormatError
from gguf_export.contract import RUNNABLE, OpenedFile, Report
from gguf_export.pwri.dense_layers import dense_layers
from gguf_export.pwri.schema import DENSE_THRESHOLD
from gguf_files.names import FINGERPRINT_KEY
from gguf_files.reader import GGUFFile
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.engine.perplexity import engine_perplexity
from powerinfer_bridge.verify.numbers import Compared, compared_text, json_number, relu_form
from powerinfer_bridge.verify.tensors import same_numbers
from powerinfer_bridge.verify.tokens import same_ids

Target = tuple[TensorRule, int, str]
"""A tensor of a checkpoint: its rule and layer, and its name in the file."""

CompareAll = Callable[[GGUFFile, Checkpoint, Sequence[Target]], None]
"""Demands that a file's tensors are the checkpoint's; raises FormatError."""


def compare_all(file: GGUFFile, checkpoint: Checkpoint, targets: Sequence[Target]) -> None:
    """Compare tensors one after the other, one in memory at a time."""
    for target in tqdm(targets, unit="tensor", desc="compare", disable=None):
        compare_tensor(file, checkpoint, target)


def check_model(
    report: Report,
    opened: OpenedFile,
    checkpoint: Checkpoint,
    compare: CompareAll = compare_all,
) -> None:
    """Compare sizes, tensors and tokens of a file with those of its checkpoint."""
    report.check("model fingerprint", lambda: check_fingerprint(opened.file, checkpoint), "file")
    report.check("model sizes", lambda: _sizes(opened, checkpoint), "keys", "tokenizer")
    report.check("model tensors", lambda: _same_tensors(opened.file, checkpoint, compare), "layout")
    report.check(
        "model tokenizer", lambda: same_ids(opened, checkpoint, compared_text()), "tokenizer"
    )


def check_numbers(
    report: Report,
    opened: OpenedFile,
    checkpoint: Checkpoint,
    context: int,
    chunks: int,
    max_ppl_gap: float | None,
) -> None:
    """Run both models and compare; figures go to the report (settings: `verification.verify`)."""
    numbers = _Numbers(opened, checkpoint, context, chunks, report.figures)
    ready = (*RUNNABLE, "model sizes")
    report.check("dense logits", numbers.dense, *ready)
    report.check("sparse logits", numbers.sparse, *ready)
    report.check("perplexity gap", lambda: numbers.gap(max_ppl_gap), *ready)


def check_fingerprint(file: GGUFFile, checkpoint: Checkpoint) -> str:
    """Demand that a file names a checkpoint as its model."""
    if file.value(FINGERPRINT_KEY, GGUFValueType.STRING) != checkpoint.fingerprint:
        raise FormatError(
            f"{FINGERPRINT_KEY} is another model's", "pass the --model it was made from"
        )
    return "the file was made from this model"


def _sizes(opened: OpenedFile, checkpoint: Checkpoint) -> str:
    architecture = opened.file.value("general.architecture", GGUFValueType.STRING)
    if architecture != checkpoint.architecture.gguf_name:
        expected = checkpoint.architecture.gguf_name
        raise FormatError(
            f"architecture is {architecture}, the model has {expected}", "export it again"
        )
    require_sizes(opened, checkpoint)
    return f"sizes and constants of {checkpoint.architecture.name}"


def require_sizes(opened: OpenedFile, checkpoint: Checkpoint, d_ff: int | None = None) -> None:
    """Do nothing if a file has its model's sizes and constants.

    Args:
        opened: the file.
        checkpoint: the model.
        d_ff: neurons that the file has for the model's; None for as many.

    Raises:
        FormatError: naming the first that differs.
    """
    hyper, shape = opened.hyper, checkpoint.shape
    pairs: list[tuple[str, Any, Any]] = [
        ("vocabulary", len(opened.vocabulary.tokens), shape.vocab_size),
        ("matrices of an FFN", 3 if hyper.graph.gated else 2, checkpoint.architecture.ffn_matrices),
        ("scaling of positions", _scaling(hyper.rope_scaling), _scaling(shape.rope_scaling)),
    ]
    pairs.append(("d_ff", hyper.d_ff, shape.d_ff if d_ff is None else d_ff))
    sizes = ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "context_length")
    pairs += [(key, getattr(hyper, key), getattr(shape, key)) for key in sizes]
    for name, found, expected in pairs:
        if found != expected:
            raise FormatError(f"{name} is {found}, the model has {expected}", "export it again")
    names = ["rope_theta", "activation_threshold", *(["norm_eps"] if hyper.graph.norm_key else [])]
    for name in names:
        found, expected = getattr(hyper, name), getattr(shape, name)
        if not math.isclose(found, expected, rel_tol=1e-6):  # float32 in the file
            raise FormatError(f"{name} is {found:g}, the model has {expected:g}", "export it again")


def _scaling(scaling: RopeScaling | None) -> tuple[str, str, int] | None:
    """Return a scaling of factor other than 1 with as many digits as float32 keeps."""
    if scaling is None or scaling.factor == 1:
        return None
    return scaling.kind, f"{scaling.factor:.6g}", scaling.original_context


def compare_tensor(file: GGUFFile, checkpoint: Checkpoint, target: Target) -> None:
    """Compare a tensor bit by bit.

    Raises:
        FormatError: it differs, is missing or cannot be read.
    """
    rule, layer, name = target
    expected = _laid_out(checkpoint.read(rule, layer), rule, checkpoint.shape).contiguous()
    info = file.tensors.get(name)
    sizes = expected.shape if info is None else info.shape
    if sizes != expected.shape or not same_numbers(file, name, expected):
        raise FormatError(f"tensor {name} differs from the model's", "export it again")
    file.forget()


def _same_tensors(file: GGUFFile, checkpoint: Checkpoint, compare: CompareAll) -> str:
    """Compare all tensors but predictors."""
    targets = list(tensor_targets(checkpoint))
    compare(file, checkpoint, targets)
    return f"{len(targets)} are the model's, to the bit or rounded to their types"


def tensor_targets(checkpoint: Checkpoint) -> Iterator[Target]:
    """Yield what is exported of a checkpoint."""
    for rule, target in checkpoint.architecture.exported:
        for layer in range(checkpoint.shape.n_layers if rule.per_layer else 1):
            yield rule, layer, target.format(layer=layer)


def _laid_out(weight: torch.Tensor, rule: TensorRule, shape: ModelShape) -> torch.Tensor:
    """Return a checkpoint's tensor in the file's layout, told row by row."""
    if rule.transform == "transpose":
        return weight.T
    if rule.transform == "none":
        return weight
    if rule.transform == "group_qkv":
        return weight[_qkv_rows(shape)]
    # Row 2i + c of a head is the i-th of its half c: ggml's RoPE turns neighbours.
    half = shape.head_dim // 2
    order = torch.tensor([half * (row % 2) + row // 2 for row in range(shape.head_dim)])
    heads = torch.arange(len(weight) // shape.head_dim) * shape.head_dim
    return weight[(heads[:, None] + order).reshape(-1)]


def _qkv_rows(shape: ModelShape) -> torch.Tensor:
    """Return where Falcon's fused matrix has the rows of all queries, keys and values in turn."""
    group = shape.n_heads // shape.n_kv_heads
    queries = [head // group * (group + 2) + head % group for head in range(shape.n_heads)]
    keys = [number * (group + 2) + group for number in range(shape.n_kv_heads)]
    heads = torch.tensor([*queries, *keys, *(key + 1 for key in keys)])
    return (heads[:, None] * shape.head_dim + torch.arange(shape.head_dim)).reshape(-1)


@dataclass(frozen=True)
class _Numbers(Compared):
    """The file's numbers against its model's, both with ReLU: FATReLU is not PowerInfer's."""

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.opened.path)

    @cached_property
    def reference(self) -> torch.Tensor:
        """Transformers' logits (tokens, vocab_size) in float32; each block is read once."""
        checkpoint = relu_form(self.checkpoint)
        model = load_model(checkpoint, dtype=torch.float32, device="cpu", weights="streamed")
        return model.logits(torch.tensor([self.ids]))[0]

    def _logits(self, threshold: float) -> torch.Tensor:
        engine = self.engine.with_threshold(threshold)
        return engine.forward(self.ids, KVCache(engine.hyper.n_layers))

    def dense(self) -> str:
        """Judge the logits of all neurons."""
        expected = self.reference  # first: its weights are dropped before the engine's fill memory
        return self.judge_logits(self._logits(DENSE_THRESHOLD), expected)

    def sparse(self) -> str:
        """Report how far predictors move the logits; only what is no number fails."""
        logits = self._sparse_logits()
        largest, spread = self.differ("sparse", logits, self.reference)
        same = float((logits.argmax(-1) == self.reference.argmax(-1)).double().mean())
        return (
            f"largest difference {largest:.4g}, spread {spread:.4g}, "
            f"likeliest token equal in {same:.1%}; not judged"
        )

    def _sparse_logits(self) -> torch.Tensor:
        """Return the logits with predictors; a dense layer of which a neuron is skipped fails."""
        engine = self.engine.with_threshold(self.opened.hyper.threshold)
        counts = engine.count()
        logits = engine.forward(self.ids, KVCache(engine.hyper.n_layers))
        for layer in dense_layers(self.opened.file):
            if (skipped := counts[layer].decisions - counts[layer].predicted) != 0:
                raise EngineError(
                    f"layer {layer} is said to be dense, and {skipped} of its neurons were skipped",
                    EXPORT_AGAIN,
                )
        return logits

    def gap(self, bound: float | None) -> str:
        """Report the perplexity gap, and judge it where a bound is given."""
        thresholds = {"dense": DENSE_THRESHOLD, "sparse": self.opened.hyper.threshold}
        ppl: dict[str, float] = {}
        for name, threshold in thresholds.items():
            engine = self.engine.with_threshold(threshold)
            ppl[name] = engine_perplexity(engine, compared_text(), self.context, self.chunks, name)
        self.figures.update({f"ppl_{name}": json_number(ppl[name]) for name in ppl})
        gap = ppl["sparse"] / ppl["dense"] - 1
        self.figures["ppl_gap"] = json_number(gap)
        line = f"{gap:+.3%} ({ppl['dense']:.4f} dense, {ppl['sparse']:.4f} sparse)"
        if not math.isfinite(gap):
            raise EngineError(f"{line}: no finite number", "the weights are unusable")
        if bound is not None and not gap <= bound:
            raise EngineError(f"{line}: above {bound:.3%}", "train better predictors or allow more")
        return line + (", not judged" if bound is None else f", at most {bound:.3%}")
