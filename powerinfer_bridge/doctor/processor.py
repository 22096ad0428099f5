"""The processor: what PowerInfer's code needs, and how many threads make sense."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from powerinfer_bridge.doctor.cgroups import cpu_quota
from powerinfer_bridge.doctor.finding import Finding, note, ok, warning

_X86 = ("x86_64", "amd64")
_NEEDED = ("avx2", "f16c", "fma")
"""What PowerInfer@d3ebd7c ggml.c:ggml_axpy_avx_f16 is written for; without AVX2 it is a plain loop.
A build is for the processor that it was made on (CMakeLists.txt: -march=native)."""


@dataclass(frozen=True, kw_only=True)
class ProcessorFacts:
    """The processor.

    Attributes:
        name: its model; empty if unknown.
        architecture: such as `x86_64`.
        flags: names of its extensions; None if unknown.
        logical: hardware threads of the machine.
        usable: of them open to this process.
        physical: cores; None if unknown.
        quota: CPUs' time that a container may use; None without a limit.
        load: average number of running processes of the last minute; None if unknown.
    """

    name: str
    architecture: str
    flags: frozenset[str] | None
    logical: int
    usable: int
    physical: int | None
    quota: float | None
    load: float | None

    @property
    def threads(self) -> int:
        """Threads that run at the same time, at most."""
        cores = self.usable if self.physical is None else min(self.usable, self.physical)
        return max(1, cores if self.quota is None else min(cores, int(self.quota)))


def read_processor(root: Path = Path("/")) -> ProcessorFacts:
    """Read the system's files; what it does not tell is None."""
    fields = _fields(root / "proc/cpuinfo")
    flags = fields.get("flags") or fields.get("features")
    has_load = hasattr(os, "getloadavg")
    return ProcessorFacts(
        name=fields.get("model name", ""),
        architecture=platform.machine(),
        flags=None if flags is None else frozenset(flags.split()),
        logical=os.cpu_count() or 1,
        usable=usable_threads(),
        physical=_physical(root),
        quota=cpu_quota(root),
        load=os.getloadavg()[0] if has_load else None,
    )


def usable_threads() -> int:
    """Return the hardware threads that are open to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _fields(path: Path) -> dict[str, str]:
    """Return the first processor's lines of /proc/cpuinfo."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = [line.partition(":") for line in lines if ":" in line]
    return {name.strip().lower(): value.strip() for name, _, value in reversed(pairs)}


def _physical(root: Path) -> int | None:
    """Return the cores: threads of one core list the same siblings."""
    lists = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    return len({path.read_text().strip() for path in lists}) or None


def processor_findings(facts: ProcessorFacts) -> Iterator[Finding]:
    """Judge instructions, cores and load."""
    yield _instructions(facts)
    yield _cores(facts)
    if facts.load is not None:
        yield _load(facts, facts.load)


def _instructions(facts: ProcessorFacts) -> Finding:
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


def _cores(facts: ProcessorFacts) -> Finding:
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


def _load(facts: ProcessorFacts, load: float) -> Finding:
    found = f"{load:.1f} processes ran on average in the last minute"
    if load > max(0.5, 0.25 * facts.usable):
        remedy = "wait until the machine is idle before you time anything"
        return warning("load", f"{found}: timings would be worthless now", remedy)
    return ok("load", found)
