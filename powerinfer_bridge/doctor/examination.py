"""`doctor`: all checks in order, and the document of what they found."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from common.version import tool_version
from powerinfer_bridge.doctor.disk import (
    output_findings,
    read_disk,
    temporary_disk,
    temporary_findings,
)
from powerinfer_bridge.doctor.finding import Finding, Status, guarded
from powerinfer_bridge.doctor.gpu import Gpu, GpuFacts, gpu_findings, read_gpus
from powerinfer_bridge.doctor.memory import memory_findings, read_memory
from powerinfer_bridge.doctor.packages import package_findings, read_packages
from powerinfer_bridge.doctor.processor import (
    processor_findings,
    read_processor,
    usable_threads,
)
from powerinfer_bridge.doctor.programs import (
    check_llama_cpp,
    check_llama_cpp_python,
    check_powerinfer,
)
from powerinfer_bridge.doctor.settings import DoctorConfig
from powerinfer_bridge.doctor.torch_build import read_torch, torch_findings
from powerinfer_bridge.doctor.variables import variable_findings

SCHEMA_VERSION = 1


def examine(config: DoctorConfig) -> dict[str, Any]:
    """Run every check.

    Args:
        config: what to look at.

    Returns:
        A JSON-ready document: `healthy` (no problem), `counts` by status and `findings` in the
        order of the checks.
    """
    findings = list(_findings(config))
    counts = {status.value: 0 for status in Status}
    for finding in findings:
        counts[finding.status.value] += 1
    return {
        "kind": "psp.doctor",
        "schema_version": SCHEMA_VERSION,
        "tool_version": tool_version(),
        "healthy": not counts[Status.PROBLEM.value],
        "counts": counts,
        "findings": [finding.document() for finding in findings],
    }


def _findings(config: DoctorConfig) -> Iterator[Finding]:
    cards = read_gpus()
    yield from guarded("packages", lambda: package_findings(read_packages()))
    yield from guarded("torch", lambda: torch_findings(read_torch(), cards.gpus))
    yield from _machine(config, cards)
    yield from _programs(config, cards.gpus)
    yield from _inputs(config, cards.gpus)
    yield from guarded("temporary disk", lambda: temporary_findings(temporary_disk()))


def _machine(config: DoctorConfig, cards: GpuFacts) -> Iterator[Finding]:
    yield from gpu_findings(cards)
    yield from guarded("CPU", lambda: processor_findings(read_processor()))
    file_bytes = _file_bytes(config.file)
    yield from guarded("memory", lambda: memory_findings(read_memory(), file_bytes, cards.gpus))
    yield from variable_findings(
        os.environ, usable_threads=usable_threads(), has_gpu=bool(cards.gpus)
    )


def _file_bytes(path: Path | None) -> int | None:
    return path.stat().st_size if path is not None and path.is_file() else None


def _programs(config: DoctorConfig, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    timeout = config.timeout
    yield from guarded("PowerInfer", lambda: check_powerinfer(config.powerinfer_bin, gpus, timeout))
    yield from guarded("llama.cpp", lambda: check_llama_cpp(config.llama_cpp_bin, gpus, timeout))
    if any(metadata.distributions(name="llama-cpp-python")):
        yield from guarded("llama-cpp-python", lambda: check_llama_cpp_python(gpus))


def _inputs(config: DoctorConfig, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    file, model = config.file, config.model
    if file is not None:
        yield from guarded("file", lambda: _file(file, gpus))
    if model is not None:
        yield from guarded("model", lambda: _model(model, config))
    else:
        need = _file_bytes(file)
        disk = config.outputs
        yield from guarded("output disk", lambda: output_findings(read_disk(disk), need))


def _file(path: Path, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    from powerinfer_bridge.doctor.bundle import check_bundle

    yield from check_bundle(path, gpus)


def _model(directory: Path, config: DoctorConfig) -> Iterator[Finding]:
    from powerinfer_bridge.doctor.checkpoint import checkpoint_findings, read_checkpoint

    facts = read_checkpoint(directory, config.file)
    yield from checkpoint_findings(facts)
    yield from output_findings(read_disk(config.outputs), facts.export_bytes)
