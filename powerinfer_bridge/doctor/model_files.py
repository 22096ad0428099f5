"""A model's files: one exported for PowerInfer, by its header, and the checkpoint that it is of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote

from gguf import GGUFValueType

from architectures.checkpoint import Checkpoint
from architectures.gguf_model.source import local_path
from common.errors import CheckpointError, FormatError, PspError, printable
from common.finding import Finding, Status, from_error, note, ok, problem, warning
from common.machine import Gpu
from common.units import size
from gguf_export.contract import OpenedFile, Report, check_structure
from gguf_export.origin import made_from
from gguf_export.pwri.schema import SMALLEST_D_FF
from gguf_export.smallthinker.contract import (
    ExpertFile,
    check_expert_structure,
    open_model_file,
)
from gguf_export.smallthinker.mixture_contract import MixtureFile, check_mixture_structure
from gguf_files.reader import GGUFFile
from powerinfer_bridge.doctor.companions import check_companions

_F16_BYTES = 2
_SMALLEST_RANK = 32


def check_file(path: Path, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """Judge a file; what lies beside it only if the file itself is sound."""
    try:
        opened = open_model_file(path)
    except PspError as error:
        yield from_error("file", error)
        return
    if isinstance(opened, ExpertFile | MixtureFile):
        yield from _expert_findings(opened)
        return
    findings = list(file_findings(opened))
    yield from findings
    if all(finding.status is not Status.PROBLEM for finding in findings):
        yield from check_companions(opened, gpus)


def file_findings(opened: OpenedFile) -> Iterator[Finding]:
    """Judge a file by PowerInfer's contract, one problem for each thing that it breaks."""
    try:
        file = opened.file
    except PspError as error:
        yield from_error("file", error)
        return
    small = _small_ffn(file)
    if small is not None:
        yield problem(
            "file",
            f"d_ff is {small}: PowerInfer computes FFNs below {SMALLEST_D_FF} neurons wrongly",
            "use a model with a wider FFN",
        )
        return
    report = Report(opened.path)
    check_structure(report, opened, header_only=True)
    bad = list(_broken(report))
    yield from bad
    if not bad:
        path, hyper, types = opened.path, opened.hyper, report.checks["types"].detail
        yield ok(
            "file",
            f"{printable(str(path))}: {size(path.stat().st_size)}, {hyper.n_layers} layers, "
            f"d_model {hyper.d_model}, d_ff {hyper.d_ff}, {types}; "
            f"all {len(report.checks)} checks of its header hold",
        )


def _expert_findings(opened: ExpertFile | MixtureFile) -> Iterator[Finding]:
    """Judge a file of arch `smallthinker` by its graph's contract; nothing lies beside it."""
    report = Report(opened.path)
    if isinstance(opened, MixtureFile):
        check_mixture_structure(report, opened, header_only=True)
    else:
        check_expert_structure(report, opened, header_only=True)
    bad = list(_broken(report))
    yield from bad
    if not bad:
        path = opened.path
        yield ok(
            "file",
            f"{printable(str(path))}: {size(path.stat().st_size)}, "
            f"{report.checks['keys'].detail}, {report.checks['engine'].detail}; "
            f"all {len(report.checks)} checks of its header hold",
        )


def _small_ffn(file: GGUFFile) -> int | None:
    """Return d_ff if it is too small, which the check of the keys tells less plainly."""
    try:
        kind = file.value("general.architecture", GGUFValueType.STRING)
        d_ff: int = file.value(f"{kind}.feed_forward_length", GGUFValueType.UINT32)
    except FormatError:
        return None  # the checks tell
    return d_ff if d_ff < SMALLEST_D_FF else None


def _broken(report: Report) -> Iterator[Finding]:
    """Yield a problem for each check that failed, not for those that could not run."""
    look = f"look into it with psp verify {quote(str(report.path))}"
    for name, outcome in report.checks.items():
        if not outcome.ok and not outcome.detail.startswith("not checked"):
            yield problem(f"file: {name}", outcome.detail, outcome.remedy or look)


def open_checkpoint(model: Path) -> Checkpoint:
    """Open a checkpoint of this disk, a directory or a GGUF file; nothing is fetched.

    Raises:
        CheckpointError: not there, an unsupported family, or damaged.
    """
    if not local_path(str(model)).exists():
        problem = f"{model}: no such directory or file"
        raise CheckpointError(problem, "pass a checkpoint's directory or GGUF file")
    return Checkpoint.open(model)


def export_bytes(checkpoint: Checkpoint) -> int:
    """Return about what an F16 export takes: predictors of a usual rank are written twice."""
    shape, rules = checkpoint.shape, checkpoint.architecture.tensors
    numbers = sum(
        math.prod(rule.shape(shape)) * (shape.n_layers if rule.per_layer else 1) for rule in rules
    )
    rank = max(_SMALLEST_RANK, shape.d_model // 4)
    predictors = shape.n_layers * rank * (shape.d_model + shape.d_ff)
    return (numbers + 2 * predictors) * _F16_BYTES


def _made(checkpoint: Checkpoint, path: Path) -> bool | None:
    """Return whether a file says that it was made from a checkpoint; None if it does not say."""
    try:
        return made_from(GGUFFile(path), checkpoint)
    except FormatError:
        return None  # is a finding of its own


def checkpoint_findings(checkpoint: Checkpoint, file: Path | None) -> Iterator[Finding]:
    """Describe a usable checkpoint, and tell whether the file is of it, if one is examined too."""
    made, shape = None if file is None else _made(checkpoint, file), checkpoint.shape
    sizes = f"{shape.n_layers} layers, d_model {shape.d_model}, d_ff {shape.d_ff}"
    export = f"F16 export about {size(export_bytes(checkpoint))}"
    yield ok("model", f"{checkpoint.architecture.name}, {shape.activation}, {sizes}; {export}")
    yield from (note("model", line) for line in checkpoint.notes)
    if made is False:
        found = "the file was made from another model than --model"
        yield warning("file's model", found, "pass the model that it was exported from")
    elif made:
        yield ok("file's model", "the file was made from --model")
