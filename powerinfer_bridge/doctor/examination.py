"""`doctor`: all checks in order, and what they found as a document and as text."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from common.errors import printable
from common.machine import Gpu, Gpus, read_gpus, read_memory, read_processor, usable_threads
from common.typed_json import plain
from common.version import tool_version
from powerinfer_bridge.doctor.environment import (
    gpu_findings,
    memory_findings,
    open_file_findings,
    output_findings,
    processor_findings,
    read_disk,
    read_open_files,
    temporary_findings,
    variable_findings,
)
from powerinfer_bridge.doctor.finding import Finding, Status, guarded
from powerinfer_bridge.doctor.programs import check_llama_cpp, check_powerinfer, program_findings
from powerinfer_bridge.doctor.settings import DoctorConfig
from powerinfer_bridge.programs.llama_cpp import LlamaCppPython

SCHEMA_VERSION = 1
WIDTH = 100
_LABEL = len("PROBLEM  ")
_LONGEST_NAME = 20
"""Names of environment variables are longer; one of them must not push all text to the right."""

_SHOWN_CHARACTERS = 1000
_PLURALS = {"problem": "problems", "warning": "warnings", "note": "notes", "ok": "ok"}


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What the doctor found, in the order of the checks."""

    findings: tuple[Finding, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Findings by status, the worst first."""
        every = [finding.status for finding in self.findings]
        return {status.value: every.count(status) for status in Status}

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return not self.counts[Status.PROBLEM.value]

    def document(self) -> dict[str, object]:
        """Return it ready for JSON."""
        return {
            "kind": "psp.doctor",
            "schema_version": SCHEMA_VERSION,
            "tool_version": tool_version(),
            "healthy": self.healthy,
            "counts": self.counts,
            "findings": plain(self.findings),
        }


def examine(config: DoctorConfig) -> Examination:
    """Run every check."""
    return Examination(findings=tuple(_findings(config)))


def _findings(config: DoctorConfig) -> Iterator[Finding]:
    gpus = read_gpus()
    yield from guarded("packages", lambda: _installation(gpus.cards))
    yield from _environment(config, gpus)
    yield from _programs(config, gpus.cards)
    yield from _inputs(config, gpus.cards)
    yield from guarded("temporary disk", lambda: temporary_findings(read_disk()))


def _installation(cards: Sequence[Gpu]) -> Iterator[Finding]:
    from powerinfer_bridge.doctor.installation import (
        package_findings,
        read_packages,
        read_torch,
        torch_findings,
    )

    yield from package_findings(read_packages())
    yield from guarded("torch", lambda: torch_findings(read_torch(), cards))


def _environment(config: DoctorConfig, gpus: Gpus) -> Iterator[Finding]:
    yield from gpu_findings(gpus)
    yield from guarded("CPU", lambda: processor_findings(read_processor()))
    file_bytes = _file_bytes(config.file)
    yield from guarded("memory", lambda: memory_findings(read_memory(), file_bytes, gpus.cards))
    yield from open_file_findings(read_open_files())
    yield from variable_findings(
        os.environ, usable_threads=usable_threads(), has_gpu=bool(gpus.cards)
    )


def _file_bytes(path: Path | None) -> int | None:
    return path.stat().st_size if path is not None and path.is_file() else None


def _programs(config: DoctorConfig, cards: Sequence[Gpu]) -> Iterator[Finding]:
    timeout = config.timeout
    powerinfer, llama_cpp = config.powerinfer_bin, config.llama_cpp_bin
    yield from guarded("PowerInfer", lambda: check_powerinfer(powerinfer, cards, timeout))
    yield from guarded("llama.cpp", lambda: check_llama_cpp(llama_cpp, cards, timeout))
    if any(metadata.distributions(name="llama-cpp-python")):
        yield from guarded(
            "llama-cpp-python",
            lambda: program_findings(LlamaCppPython(timeout=timeout).check(), cards),
        )


def _inputs(config: DoctorConfig, cards: Sequence[Gpu]) -> Iterator[Finding]:
    file, model, disk = config.file, config.model, config.outputs
    if file is not None:
        yield from guarded("file", lambda: _file(file, cards))
    if model is not None:
        yield from guarded("model", lambda: _model(model, config))
    else:
        need = _file_bytes(file)
        yield from guarded("output disk", lambda: output_findings(read_disk(disk), need))


def _file(path: Path, cards: Sequence[Gpu]) -> Iterator[Finding]:
    from powerinfer_bridge.doctor.model_files import check_file

    yield from check_file(path, cards)


def _model(directory: Path, config: DoctorConfig) -> Iterator[Finding]:
    from powerinfer_bridge.doctor.model_files import (
        checkpoint_findings,
        export_bytes,
        open_checkpoint,
    )

    checkpoint = open_checkpoint(directory)
    yield from checkpoint_findings(checkpoint, config.file)
    yield from output_findings(read_disk(config.outputs), export_bytes(checkpoint))


def findings_text(examination: Examination) -> str:
    """Return what was found as text, the worst first.

    Groups by status, each in the order of the checks; then a verdict. Commands to copy are
    not broken, so a line that holds one may be wider than `WIDTH`.
    """
    lengths = [len(finding.check) for finding in examination.findings]
    indent = _LABEL + max((length for length in lengths if length <= _LONGEST_NAME), default=0) + 2
    groups = []
    for status in Status:
        chosen = [finding for finding in examination.findings if finding.status is status]
        if chosen:
            groups.append("\n".join(_lines(chosen, indent)))
    return "\n\n".join([*groups, _verdict(examination)])


def _lines(findings: Sequence[Finding], indent: int) -> Iterator[str]:
    for finding in findings:
        status = finding.status.value
        label = status if status in ("ok", "note") else status.upper()
        name = f"{label:<{_LABEL}}{finding.check}  "
        yield from _wrapped(f"{name:<{indent}}", finding.found, indent)
        if finding.remedy is not None:
            yield from _wrapped(" " * (indent - 3) + "-> ", finding.remedy, indent)


def _wrapped(first: str, text: str, indent: int) -> list[str]:
    shown = printable(text, _SHOWN_CHARACTERS)
    if text.startswith("psp "):
        return [first + shown]
    return textwrap.wrap(
        shown,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _verdict(examination: Examination) -> str:
    told = [
        f"{number} {status if number == 1 else _PLURALS[status]}"
        for status, number in examination.counts.items()
        if number
    ]
    return f"{'healthy' if examination.healthy else 'not healthy'}: {', '.join(told)}"
