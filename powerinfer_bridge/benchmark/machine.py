"""The machine and the versions that figures depend on."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from common.machine import cpu_name
from common.version import tool_version
from powerinfer_bridge.benchmark.subject import Subject

_QUERY = [
    "nvidia-smi",
    "--query-gpu=name,memory.total,memory.free",
    "--format=csv,noheader,nounits",
]
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU, sizes in bytes."""

    name: str
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What runs the benchmark.

    Attributes:
        cpu: its name.
        cpus: logical cores that this process may use.
        memory_bytes: main memory.
        gpus: NVIDIA GPUs, as their driver lists them.
        load: mean number of running processes over the last minute, before the benchmark.
    """

    cpu: str
    cpus: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    load: float = 0.0

    def document(self) -> dict[str, Any]:
        """Return what results say of it."""
        gpus = [{"name": gpu.name, "memory_bytes": gpu.memory_bytes} for gpu in self.gpus]
        sizes = {"cpus": self.cpus, "memory_bytes": self.memory_bytes}
        return {"cpu": self.cpu, **sizes, "gpus": gpus}


def this_machine() -> Machine:
    """Look at the machine."""
    return Machine(
        cpu=cpu_name(),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=tuple(_gpus()),
        load=os.getloadavg()[0],
    )


def _cores() -> int:
    return os.cpu_count() or 1


def _gpus() -> list[Gpu]:
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(done.stdout)


def parse_gpus(output: str) -> list[Gpu]:
    """Return the GPUs of nvidia-smi's lines `name, MiB in all, MiB free`; others are skipped."""
    found = []
    for line in output.splitlines():
        name, *sizes = (part.strip() for part in line.rsplit(",", 2))
        if len(sizes) == 2 and all(size.isdigit() for size in sizes):
            total, free = (int(size) * _MIB for size in sizes)
            found.append(Gpu(name=name, memory_bytes=total, free_bytes=free))
    return found


def versions(subject: Subject) -> dict[str, str | None]:
    """Return the versions of what measured; None for what did not, or does not tell."""
    real, llama_cpp = subject.powerinfer_facts, subject.llama_cpp_facts
    return {
        "psp": tool_version(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "powerinfer": None if real is None else real.version,
        "llama_cpp": None if llama_cpp is None else llama_cpp.version,
    }
