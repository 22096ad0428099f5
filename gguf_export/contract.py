"""PowerInfer's contract as checks of one file, each with a finding or a reason of one line.

Every check stands alone, so that a file with two faults is told both.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType, TokenType
from tqdm import tqdm

from common.errors import ClusterError, FormatError, PspError, printable
from gguf_export.pwri.dense_layers import check_dense_layers
from gguf_export.pwri.element_types import check_predictor_types, runnable
from gguf_export.pwri.gpu_index import file_groups, index_path, read_gpu_index
from gguf_export.pwri.hyperparameters import Hyperparameters, expected_shapes, read_hyperparameters
from gguf_export.pwri.schema import BLOCK, DENSE_THRESHOLD, THRESHOLD_KEY, parse_name
from gguf_export.tokens.vocabulary import PIECES, POWERINFER, Vocabulary, read_file_vocabulary
from gguf_files.pieces import pieces
from gguf_files.reader import GGUFFile

RUNNABLE = ("magic", "keys", "tokenizer", "tensor set", "shapes", "types", "predictor ranks")
"""What must hold before the embedded engine can run the file."""

_DETAIL = 400


@dataclass(frozen=True)
class Outcome:
    """How a check went.

    Attributes:
        ok: whether it holds.
        detail: its finding, or what is wrong.
        remedy: what to do where it does not hold; None where the check did not run or names none.
    """

    ok: bool
    detail: str
    remedy: str | None = None

    @property
    def line(self) -> str:
        """Detail and remedy in one."""
        return self.detail if self.remedy is None else f"{self.detail}; {self.remedy}"


@dataclass
class Report:
    """Results of the checks so far, in order, and the figures that they measured."""

    path: Path
    checks: dict[str, Outcome] = field(default_factory=dict)
    figures: dict[str, float | None] = field(default_factory=dict)

    def check(self, name: str, run: Callable[[], str], *needs: str) -> None:
        """Run a check, which returns its finding or raises; it is not run if a need failed."""
        unmet = [need for need in needs if not self.checks[need].ok]
        if unmet:
            self.checks[name] = Outcome(False, f"not checked, because '{unmet[0]}' failed")
            return
        try:
            self.checks[name] = Outcome(True, printable(run(), _DETAIL))
        except ClusterError:
            raise  # says nothing of the file
        except PspError as error:
            problem = error.problem.removeprefix(f"{self.path}: ")
            self.checks[name] = Outcome(False, printable(problem, _DETAIL), error.remedy)

    @property
    def ok(self) -> bool:
        """Whether all checks hold."""
        return all(outcome.ok for outcome in self.checks.values())

    def document(self) -> dict[str, Any]:
        """Return the results, ready for JSON: `checks` have `name`, `ok` and a line of `detail`."""
        checks = [
            {"name": name, "ok": outcome.ok, "detail": outcome.line}
            for name, outcome in self.checks.items()
        ]
        return {"file": str(self.path), "ok": self.ok, "checks": checks, **self.figures}


@dataclass(frozen=True)
class OpenedFile:
    """The parts of a model file, each read when first needed; each raises `FormatError`."""

    path: Path

    @property
    def engine(self) -> str:
        """Whose file it is, one of the names in `tokens.vocabulary`."""
        return POWERINFER

    @cached_property
    def file(self) -> GGUFFile:
        """The opened file."""
        return GGUFFile(self.path)

    @cached_property
    def hyper(self) -> Hyperparameters:
        """Its sizes and constants."""
        return read_hyperparameters(self.file)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Its tokenizer."""
        return read_file_vocabulary(self.file, self.engine)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes that the keys imply, -1 where any size will do."""
        value = self.file.values.get("tokenizer.ggml.tokens")
        tokens = value.data if value is not None else None
        rows = len(tokens) if isinstance(tokens, list) else -1
        return expected_shapes(self.hyper, rows)


def check_structure(report: Report, opened: OpenedFile, *, header_only: bool = False) -> None:
    """Check what holds of a file alone.

    Args:
        report: takes the results.
        opened: the file.
        header_only: read neither the tensors' numbers nor the GPU index beside the file.
    """
    check_container(report, opened)
    report.check("magic", lambda: _magic(opened.file), "file")
    report.check("keys", lambda: sizes_line(opened), "magic")
    report.check("threshold", lambda: _threshold(opened.file), "file")
    check_tensors(report, opened, "PowerInfer's")
    report.check("types", lambda: _types(opened.file), "file")
    report.check("predictor ranks", lambda: _ranks(opened), "keys")
    report.check("predictor types", lambda: check_predictor_types(opened.file), "file")
    if header_only:
        return
    check_finite(report, opened, "predictors", "norms", "weights")
    report.check("dense layers", lambda: check_dense_layers(opened.file), "layout")
    report.check("gpu index", lambda: _gpu_index(opened), "keys")


def check_container(report: Report, opened: OpenedFile) -> None:
    """Check what holds of every file of the format."""
    report.check("file", lambda: _file(opened.file))
    report.check("layout", lambda: _layout(opened.file), "file")


def check_finite(report: Report, opened: OpenedFile, *kinds: str) -> None:
    """Look at every number of tensors of some kinds: `predictors`, `norms`, `weights`."""
    for kind in kinds:
        report.check(f"{kind} finite", partial(_finite, opened, kind), "layout")


def check_tensors(report: Report, opened: OpenedFile, whose: str) -> None:
    """Check that a file has exactly the tensors that its keys imply, in their shapes.

    Args:
        report: takes the results.
        opened: the file.
        whose: tensors these are, for messages.
    """
    report.check("tokenizer", lambda: _tokenizer(opened), "file")
    report.check("tensor set", lambda: _tensor_set(opened, whose), "keys")
    report.check("shapes", lambda: _shapes(opened), "keys")


def require_layout(opened: OpenedFile) -> None:
    """Demand exactly the tensors that PowerInfer expects, as the embedded engine needs them.

    Raises:
        FormatError: a tensor too many, too few, of a wrong shape or type; unequal ranks.
    """
    _tensor_set(opened, "PowerInfer's")
    _shapes(opened)
    _types(opened.file)
    _ranks(opened)


def _file(file: GGUFFile) -> str:
    found = f"{len(file.values)} keys, {len(file.tensors)} tensors"
    return f"GGUF version {file.version}, {found}, all inside"


def _layout(file: GGUFFile) -> str:
    """Refuse tensors that share bytes: then reading each once also takes bounded time."""
    end, before = 0, ""
    for info in sorted(file.tensors.values(), key=lambda info: info.start):
        if info.start < end:
            raise file.error(f"tensors {before} and {info.name} overlap")
        end, before = info.start + info.size, info.name
    return "tensors are aligned and do not overlap"


def _magic(file: GGUFFile) -> str:
    if not file.sparse:
        raise FormatError(
            f"{file.path}: magic is GGUF, PowerInfer runs the file densely",
            "pass the *.powerinfer.gguf",
        )
    return "PWRI, run sparsely"


def sizes_line(opened: OpenedFile) -> str:
    """Return a file's sizes.

    Raises:
        FormatError: keys are missing or impossible, or a rotary key is not the head's size.
    """
    file, hyper = opened.file, opened.hyper
    architecture = file.value("general.architecture", GGUFValueType.STRING)
    key = f"{architecture}.rope.dimension_count"
    turned = file.optional(key, GGUFValueType.UINT32, hyper.head_dim)
    if turned != hyper.head_dim:
        raise file.error(f"{key} is {turned}, not the head size {hyper.head_dim}")
    return (
        f"{hyper.n_layers} layers, d_model {hyper.d_model}, d_ff {hyper.d_ff}, "
        f"{hyper.n_heads} heads, {hyper.n_kv_heads} for keys, context {hyper.context_length}"
    )


def _threshold(file: GGUFFile) -> str:
    threshold: float = file.optional(THRESHOLD_KEY, GGUFValueType.FLOAT32, 0.0)
    if not math.isfinite(threshold):
        raise file.error(f"{THRESHOLD_KEY} is {threshold}")
    if threshold <= DENSE_THRESHOLD:
        return f"{threshold:g}: no neuron is skipped, as without predictors"
    return f"neurons with a logit below {threshold:g} are skipped"


def _tokenizer(opened: OpenedFile) -> str:
    file, vocabulary = opened.file, opened.vocabulary
    types = vocabulary.types
    unknown = sorted(set(types) - set(map(int, TokenType)))
    if unknown:
        raise file.error(f"token type {unknown[0]} is unknown")
    pieces = vocabulary.kind == PIECES
    if pieces and types.count(int(TokenType.BYTE)) != 256:
        raise file.error("the 256 byte pieces are not all of type BYTE")
    if types[vocabulary.bos_id] != TokenType.CONTROL:
        raise file.error(f"BOS id {vocabulary.bos_id} is no control token")
    if not all(map(math.isfinite, vocabulary.scores)):
        raise file.error("a token's score is not finite")
    ids = {"eos": vocabulary.eos_id, "unknown": vocabulary.unk_id, "padding": vocabulary.pad_id}
    for name, number in ids.items():
        if number >= len(types):
            raise file.error(f"tokenizer.ggml.{name}_token_id is outside the vocabulary")
    kind = "SentencePiece" if pieces else f"byte-level, {len(vocabulary.merges)} merges"
    return f"{kind}, {len(types)} {'pieces' if pieces else 'tokens'}, BOS {vocabulary.bos_id}"


def _tensor_set(opened: OpenedFile, whose: str) -> str:
    found, expected = opened.file.tensors.keys(), opened.shapes.keys()
    for kind, names in (("missing", expected - found), (f"not {whose}", found - expected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise opened.file.error(f"tensor {min(names)}{more}: {kind}")
    return f"exactly {whose} {len(expected)}"


def _shapes(opened: OpenedFile) -> str:
    for name, shape in opened.shapes.items():
        info = opened.file.tensors.get(name)
        if info is not None and not (
            len(info.shape) == len(shape)
            and all(want in (-1, size) for want, size in zip(shape, info.shape, strict=True))
        ):
            raise opened.file.error(f"tensor {name} has shape {info.shape}, expected {shape}")
    return "as the keys and the vocabulary imply"


def _types(file: GGUFFile) -> str:
    for name, info in file.tensors.items():
        kinds = runnable(name, info.shape)
        if info.kind not in kinds:
            expected = " or ".join(kind.name for kind in kinds)
            raise file.error(f"tensor {name} is {info.kind.name}, expected {expected}")
    matrices = sorted({info.kind.name for info in file.tensors.values() if len(info.shape) > 1})
    return f"matrices {' and '.join(matrices)}, vectors F32"


def _ranks(opened: OpenedFile) -> str:
    ranks: list[int] = []
    for layer in range(opened.hyper.n_layers):
        pair = [opened.file.tensors.get(f"blk.{layer}.fc{part}.weight") for part in (1, 2)]
        sides = [info.shape[at] for at, info in enumerate(pair) if info and len(info.shape) == 2]
        if len(sides) < 2 or sides[0] != sides[1] or sides[0] % BLOCK:
            raise opened.file.error(
                f"layer {layer}: ranks of fc1 and fc2 are {sides}, expected two equal multiples "
                f"of {BLOCK}"
            )
        ranks.append(sides[0])
    return f"{min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else f"{ranks[0]}"


def _kind(name: str, dimensions: int) -> str:
    if parse_name(name).role == "predictor":
        return "predictors"
    return "norms" if dimensions == 1 else "weights"


def _finite(opened: OpenedFile, kind: str) -> str:
    """Look at every number of one kind of tensors, a piece in memory at a time."""
    file = opened.file
    names = [name for name, info in file.tensors.items() if _kind(name, len(info.shape)) == kind]
    for name in tqdm(names, unit="tensor", desc=f"check {kind}", disable=None):
        for _, found in pieces(file, name):
            if not np.isfinite(found).all():
                raise file.error(f"tensor {name} holds NaN or infinity")
        file.forget()
    return f"{len(names)} tensors"


def _gpu_index(opened: OpenedFile) -> str:
    """Check the index of neurons to place on the GPU, if one lies beside the file."""
    path, layers, d_ff = index_path(opened.path), opened.hyper.n_layers, opened.hyper.d_ff
    if not os.path.exists(path):  # a name too long for the suffix has none either
        return f"none beside the file ({path.name})"
    chosen, capacity = read_gpu_index(path, layers, d_ff, file_groups(opened.file))
    total = sum(int(layer.sum()) for layer in chosen)
    return f"{total} of {layers * d_ff} neurons on the GPU, {capacity} bytes"
