"""What psp runs on: graphics cards, processor, memory, disks and environment variables."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.finding import Finding, note, ok, problem, warning
from common.machine import Gpu, Gpus, Memory, Processor
from common.units import GIB, size
from powerinfer_bridge.programs.build import THRESHOLD_VARIABLE, threshold_told

THREADS, DEVICES, OFFLINE = "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE"

_MOSTLY_FREE = 0.9
_X86 = ("x86_64", "amd64")
_NEEDED = ("avx2", "f16c", "fma")
"""What PowerInfer@d3ebd7c ggml.c:ggml_axpy_avx_f16 is written for; without AVX2 it is a plain loop.
A build is for the processor that it was made on (CMakeLists.txt: -march=native)."""

_ROOM = 1.1
"""KV cache, compute buffers and the system beside the weights, as a factor."""

_FEW_FILES = 512
"""A training run keeps a file open for each layer's shard and each worker."""


def gpu_findings(gpus: Gpus) -> Iterator[Finding]:
    """Judge whether the driver answers, and how much of each card's memory is free."""
    if gpus.failure is not None:
        remedy = "mend or reinstall the NVIDIA driver, or restart the machine after an update"
        yield problem("GPU", gpus.failure, remedy)
    elif not gpus.cards:
        yield ok("GPU", "no NVIDIA card with a driver")
    for gpu in gpus.cards:
        yield _gpu(gpu)


def _gpu(gpu: Gpu) -> Finding:
    driver = f", driver {gpu.driver}" if gpu.driver else ""
    driver += f", compute capability {gpu.capability}" if gpu.capability else ""
    if not gpu.memory:
        return ok("GPU", f"{gpu.name}{driver}")
    found = f"{gpu.name}, {size(gpu.free)} of {size(gpu.memory)} free{driver}"
    if gpu.free < _MOSTLY_FREE * gpu.memory:
        return warning("GPU", found, "end the programs that hold the rest (see nvidia-smi)")
    return ok("GPU", found)


def processor_findings(facts: Processor) -> Iterator[Finding]:
    """Judge instructions, cores and load."""
    yield _instructions(facts)
    yield _cores(facts)
    if facts.load is not None:
        yield _load(facts, facts.load)


def _instructions(facts: Processor) -> Finding:
    name = facts.name or facts.architecture
    if facts.architecture.lower() not in _X86:
        return note("CPU", f"{name}: not x86-64; PowerInfer's sparse kernels are written for AVX2")
    if facts.flags is None:
        return note("CPU", f"{name}: the system does not tell its extensions")
    missing = [flag for flag in _NEEDED if flag not in facts.flags]
    if missing:
        found = (
            f"{name} has no {', '.join(missing).upper()}: PowerInfer's CPU kernels run as plain C"
        )
        remedy = "build PowerInfer on this machine (else it stops with SIGILL), or use a newer CPU"
        return warning("CPU", found, remedy)
    return ok("CPU", f"{name}, AVX2, F16C and FMA")


def _cores(facts: Processor) -> Finding:
    cores = f"{facts.physical} cores, " if facts.physical is not None else ""
    found = f"{cores}{facts.logical} hardware threads"
    if facts.usable < facts.logical:
        found += f", {facts.usable} of them open to this process"
    if facts.quota is not None and facts.quota < facts.usable:
        found += f", a container's limit of {facts.quota:g} CPUs"
        remedy = f"pass --threads {facts.threads}; more are stopped again and again"
        return warning("cores", found, remedy)
    if facts.threads < facts.logical:
        return note("cores", found, f"pass --threads {facts.threads}")
    return ok("cores", found)


def _load(facts: Processor, load: float) -> Finding:
    found = f"{load:.1f} processes ran on average in the last minute"
    if load > max(0.5, 0.25 * facts.usable):
        remedy = "wait until the machine is idle before you time anything"
        return warning("load", f"{found}: timings would be worthless now", remedy)
    return ok("load", found)


def memory_findings(
    memory: Memory, file_bytes: int | None, gpus: Sequence[Gpu]
) -> Iterator[Finding]:
    """Judge memory, against a model file if there is one."""
    found = f"{size(memory.total)}, {size(memory.available)} available"
    found += f", swap {size(memory.swap)}" if memory.swap else ", no swap"
    if memory.limit is not None and memory.limit < memory.total:
        found += f"; a container's limit of {size(memory.limit)}"
        yield note("memory", found, "what needs more is killed without a word")
    else:
        yield ok("memory", found)
    if file_bytes is not None:
        yield _fit(memory, file_bytes, gpus)


def _fit(memory: Memory, file_bytes: int, gpus: Sequence[Gpu]) -> Finding:
    """Judge a file that PowerInfer maps into memory; pages that do not fit are read each token."""
    need, vram = int(file_bytes * _ROOM), max((gpu.memory for gpu in gpus), default=0)
    usable, found = memory.usable, f"the file and its buffers need about {size(need)}"
    if need > usable + vram:
        rooms = f"{size(usable)} of RAM" + (f" and {size(vram)} of VRAM" if vram else "")
        remedy = "export with --outtype q4_0, or use a machine with more memory"
        return problem("memory for the file", f"{found}, there is {rooms}", remedy)
    if need > usable:
        remedy = "build PowerInfer with CUDA and give it a --vram-budget"
        return warning("memory for the file", f"{found}, RAM alone is {size(usable)}", remedy)
    if need > memory.available:
        remedy = "end other programs first: weights are read from disk again for every token else"
        return warning("memory for the file", f"{found}, {size(memory.available)} is free", remedy)
    return ok("memory for the file", f"{found}, which fits")


def read_open_files() -> int | None:
    """Return how many files a process may hold open; None without a limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def open_file_findings(limit: int | None) -> Iterator[Finding]:
    """Judge how many files a process may hold open, only where they are too few."""
    if limit is not None and limit < _FEW_FILES:
        remedy = "raise it for this shell: ulimit -n 4096"
        yield warning("open files", f"a process may open {limit}", remedy)


@dataclass(frozen=True, kw_only=True)
class DiskFacts:
    """One directory's disk.

    Attributes:
        path: the directory that outputs go to, or the first above it that there is.
        free: bytes that this user may still write.
        writable: whether the directory may be written to.
    """

    path: Path
    free: int
    writable: bool


def read_disk(directory: Path | None = None) -> DiskFacts:
    """Look at a directory, which need not be there yet; by default where temporary files go."""
    path = (directory or Path(os.environ.get("TMPDIR") or tempfile.gettempdir())).absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    free, writable = shutil.disk_usage(path).free, os.access(path, os.W_OK | os.X_OK)
    return DiskFacts(path=path, free=free, writable=writable)


def output_findings(facts: DiskFacts, need: int | None) -> Iterator[Finding]:
    """Judge the room for outputs.

    Args:
        facts: of the directory.
        need: bytes of an export that would go there; None if unknown.
    """
    found = f"{facts.path}: {size(facts.free)} free"
    if not facts.writable:
        yield problem("output disk", f"{facts.path} may not be written to", "choose another --out")
    elif need is not None and facts.free < need:
        found += f", an export needs about {size(need)}"
        yield problem("output disk", found, "free some space or choose another --out")
    elif facts.free < GIB:
        yield warning("output disk", found, "free some space: traces and exports are large")
    elif need is not None:
        yield ok("output disk", f"{found}, an export needs about {size(need)}")
    else:
        yield ok("output disk", found)


def temporary_findings(facts: DiskFacts) -> Iterator[Finding]:
    """Judge the room for temporary files: texts of perplexity runs, logs, compiled kernels."""
    if not facts.writable:
        remedy = "set TMPDIR to a directory of your own"
        yield problem("temporary disk", f"{facts.path} may not be written to", remedy)
    elif facts.free < GIB // 4:
        found = f"{facts.path}: {size(facts.free)} free"
        yield warning("temporary disk", found, "free some space or set TMPDIR to another disk")
    else:
        yield ok("temporary disk", f"{facts.path}: {size(facts.free)} free")


def variable_findings(
    environment: Mapping[str, str], *, usable_threads: int, has_gpu: bool
) -> Iterator[Finding]:
    """Judge the environment.

    Args:
        environment: variables by name.
        usable_threads: hardware threads open to this process.
        has_gpu: whether the machine has an NVIDIA card.
    """
    if THRESHOLD_VARIABLE in environment:
        yield _threshold(environment[THRESHOLD_VARIABLE])
    if THREADS in environment:
        yield _threads(environment[THREADS], usable_threads)
    if DEVICES in environment:
        yield _devices(environment[DEVICES], has_gpu)
    if environment.get(OFFLINE, "").lower() in ("1", "on", "true", "yes"):
        yield note(OFFLINE, "set: models and data that are not on this disk yet are not fetched")


def _threshold(value: str) -> Finding:
    found = f"{threshold_told(value)}: a PowerInfer run by hand takes it instead of the file's"
    remedy = f"unset {THRESHOLD_VARIABLE}; psp's own runs leave it out"
    return warning(THRESHOLD_VARIABLE, f"{found} threshold", remedy)


def _threads(value: str, usable: int) -> Finding:
    first = value.split(",")[0].strip()
    if not (first.isascii() and first.isdigit() and int(first)):
        return warning(THREADS, f"{value!r} is no number of threads", f"unset {THREADS}")
    if int(first) > usable:
        found = f"{first} threads, {usable} can run at the same time"
        return warning(THREADS, found, f"unset it, or set it to {usable}")
    return note(THREADS, f"{first}: torch takes so many threads unless told --threads")


def _devices(value: str, has_gpu: bool) -> Finding:
    hidden = not value.strip() or value.strip().startswith("-")
    if hidden and has_gpu:
        found = "hides all GPUs: everything runs on the CPU"
        return warning(DEVICES, found, f"unset {DEVICES} to use the GPU")
    said = "hides all GPUs, there are none" if hidden else f"only GPU {value} is visible"
    return note(DEVICES, said)
