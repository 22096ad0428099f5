"""A model file by its header: whether PowerInfer runs it. No tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from gguf import GGUFValueType

from common.errors import FormatError, PspError
from gguf_export.pwri.inspection import printable
from gguf_export.pwri.reader import GGUFFile
from gguf_export.pwri.schema import SMALLEST_D_FF
from powerinfer_bridge.contract import Report, Subject, check_structure
from powerinfer_bridge.doctor.finding import Finding, from_error, ok, problem, size


@dataclass
class HeaderReport(Report):
    """The checks of `contract.check_structure` that the header alone decides."""

    def check(self, name: str, run: Callable[[], str], *needs: str) -> None:
        """Run a check unless it reads every number, or is that of the GPU index."""
        if not name.endswith(" finite") and name != "gpu index":
            super().check(name, run, *needs)


def file_findings(path: Path) -> Iterator[Finding]:
    """Judge a file by PowerInfer's contract, one problem for each thing that it breaks."""
    subject = Subject(path)
    try:
        file = subject.file
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
    report = HeaderReport(path)
    check_structure(report, subject)
    bad = list(_broken(report))
    yield from bad
    if not bad:
        hyper, types = subject.hyper, report.checks["types"].detail
        yield ok(
            "file",
            f"{printable(str(path))}: {size(path.stat().st_size)}, {hyper.n_layers} layers, "
            f"d_model {hyper.d_model}, d_ff {hyper.d_ff}, {types}; "
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
