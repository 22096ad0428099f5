"""PowerInfer's and llama.cpp's programs: there, startable, and built for this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from common.finding import Finding, note, ok, warning
from common.machine import Gpu
from powerinfer_bridge.programs.llama_cpp import LlamaCpp
from powerinfer_bridge.programs.sample import ProgramFacts


def check_powerinfer(
    directory: Path | None, gpus: Sequence[Gpu], timeout: float
) -> Iterator[Finding]:
    """Start PowerInfer's programs and judge the build.

    Raises:
        EngineError: missing, not startable, hanging, or somebody else's.
    """
    if directory is None:
        remedy = "pass --powerinfer-bin DIR; without it psp runs its embedded engine"
        yield note("PowerInfer", "no directory given, not looked at", remedy)
        return
    from powerinfer_bridge.programs.powerinfer import PowerInfer

    facts = PowerInfer(directory, timeout=timeout).check()
    yield from program_findings(facts, gpus)
    found = f"right with -t {facts.exact_threads}; more threads overwrite each other's sums"
    remedy = "let psp bench-powerinfer --threads N show what N make of it (docs/powerinfer.md)"
    yield note("PowerInfer's text", found, remedy)
    if facts.cuda:
        found = "'python3 -m powerinfer' is not needed for files with an index of psp gpu-split"
        yield ok("PowerInfer's solver", found)


def check_llama_cpp(
    directory: Path | None, gpus: Sequence[Gpu], timeout: float
) -> Iterator[Finding]:
    """Start llama.cpp's program and judge the build.

    Raises:
        EngineError: missing, not startable, hanging, or somebody else's.
    """
    if directory is None:
        remedy = "pass --llama-cpp-bin DIR to have a dense baseline"
        yield note("llama.cpp", "no directory given, not looked at", remedy)
        return
    yield from program_findings(LlamaCpp(directory, timeout=timeout).check(), gpus)


def program_findings(facts: ProgramFacts, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """Judge a program that starts: does its build fit the machine's cards."""
    name = "PowerInfer" if facts.kind == "powerinfer" else facts.kind
    version = f"{facts.version}, " if facts.version else ""
    build = {
        True: "built with CUDA",
        False: "built for the CPU",
        None: "starts; it does not say whether it was built with CUDA",
    }[facts.cuda]
    found = f"{facts.path}: {version}{build}"
    if facts.cuda and not gpus:
        yield warning(name, f"{found}, but there is no NVIDIA GPU", "use a build for the CPU here")
    elif facts.cuda is False and gpus:
        remedy = f"build it with CUDA to use the {gpus[0].name}"
        yield warning(name, f"{found}, though there is a GPU", remedy)
    else:
        yield ok(name, found)
