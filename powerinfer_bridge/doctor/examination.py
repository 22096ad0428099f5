"""`doctor`: all checks in order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from common.examination import Examination
from common.finding import Finding, guarded
from common.machine import Gpu, Gpus, read_gpus, read_memory, read_processor, usable_threads
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
from powerinfer_bridge.doctor.programs import check_llama_cpp, check_powerinfer, program_findings
from powerinfer_bridge.doctor.settings import DoctorConfig
from powerinfer_bridge.programs.llama_cpp import LlamaCppPython

KIND = "psp.doctor"


def examine(config: DoctorConfig) -> Examination:
    """Run every check."""
    return Examination(kind=KIND, findings=tuple(_findings(config)))


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
