"""Main memory: what there is, what a container leaves of it, and whether a file fits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from powerinfer_bridge.doctor.cgroups import memory_limit
from powerinfer_bridge.doctor.finding import Finding, note, ok, problem, size, warning
from powerinfer_bridge.doctor.gpu import Gpu

_LINE = re.compile(r"(\w+):\s+(\d+) kB")
_ROOM = 1.1
"""KV cache, compute buffers and the system beside the weights, as a factor."""

_FEW_FILES = 512
"""A training run keeps a file open for each layer's shard and each worker."""


@dataclass(frozen=True, kw_only=True)
class MemoryFacts:
    """Main memory, bytes.

    Attributes:
        total: of the machine; None if unknown.
        available: without swapping; None if unknown.
        swap: size of the swap space.
        limit: what a container may use; None without a limit.
        open_files: files that a process may hold open; None without a limit.
    """

    total: int | None
    available: int | None
    swap: int
    limit: int | None
    open_files: int | None

    @property
    def usable(self) -> int | None:
        """What this process can have at most."""
        known = [number for number in (self.total, self.limit) if number is not None]
        return min(known, default=None)


def read_memory(root: Path = Path("/")) -> MemoryFacts:
    """Read the system's files; what it does not tell is None."""
    try:
        text = (root / "proc/meminfo").read_text()
    except OSError:
        text = ""
    sizes = {name: int(number) * 1024 for name, number in _LINE.findall(text)}
    return MemoryFacts(
        total=sizes.get("MemTotal"),
        available=sizes.get("MemAvailable"),
        swap=sizes.get("SwapTotal", 0),
        limit=memory_limit(root),
        open_files=_open_files(),
    )


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def memory_findings(
    facts: MemoryFacts, file_bytes: int | None, gpus: Sequence[Gpu]
) -> Iterator[Finding]:
    """Judge memory, against a model file if there is one."""
    yield _size(facts)
    if file_bytes is not None and facts.usable is not None:
        yield _fit(facts, facts.usable, file_bytes, gpus)
    if facts.open_files is not None and facts.open_files < _FEW_FILES:
        found = f"a process may open {facts.open_files}"
        yield warning("open files", found, "raise it for this shell: ulimit -n 4096")


def _size(facts: MemoryFacts) -> Finding:
    if facts.total is None:
        return note("memory", "the system does not tell its size")
    found = size(facts.total)
    if facts.available is not None:
        found += f", {size(facts.available)} available"
    found += f", swap {size(facts.swap)}" if facts.swap else ", no swap"
    if facts.limit is not None and facts.limit < facts.total:
        found += f"; a container's limit of {size(facts.limit)}"
        return note("memory", found, "what needs more is killed without a word")
    return ok("memory", found)


def _fit(facts: MemoryFacts, usable: int, file_bytes: int, gpus: Sequence[Gpu]) -> Finding:
    """Judge a file that PowerInfer maps into memory; pages that do not fit are read each token."""
    need, vram = int(file_bytes * _ROOM), max((gpu.memory for gpu in gpus), default=0)
    found = f"the file and its buffers need about {size(need)}"
    if need > usable + vram:
        rooms = f"{size(usable)} of RAM" + (f" and {size(vram)} of VRAM" if vram else "")
        remedy = "export with --outtype q4_0, or use a machine with more memory"
        return problem("memory for the file", f"{found}, there is {rooms}", remedy)
    if need > usable:
        remedy = "build PowerInfer with CUDA and give it a --vram-budget"
        return warning("memory for the file", f"{found}, RAM alone is {size(usable)}", remedy)
    if facts.available is not None and need > facts.available:
        remedy = "end other programs first: weights are read from disk again for every token else"
        return warning("memory for the file", f"{found}, {size(facts.available)} is free", remedy)
    return ok("memory for the file", f"{found}, which fits")
