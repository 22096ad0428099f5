"""This machine as psp may use it: memory and CPU time with a container's limits, cores, GPUs.

A container limits the control groups that its processes are in. Version 2 has one tree with
`memory.max` and `cpu.max`; version 1 a tree for each kind, with `memory.limit_in_bytes` and
`cpu.cfs_quota_us` (Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1). A limit of a
group holds for all groups in it, so the smallest on the way up counts.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.units import MIB

if TYPE_CHECKING:
    import torch

ROOT = Path("/")
_TREES = "sys/fs/cgroup"
CPU_SHARE, GPU_SHARE = 0.6, 0.8
_GPU_QUERY = "name,memory.total,memory.free,driver_version,compute_cap"
_GPU_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Main memory, bytes.

    Attributes:
        total: of the machine.
        available: without swapping.
        swap: size of the swap space.
        limit: what a container may use; None without a limit.
    """

    total: int
    available: int
    swap: int
    limit: int | None

    @property
    def usable(self) -> int:
        """What this process can have at most."""
        return self.total if self.limit is None else min(self.total, self.limit)


def read_memory(root: Path = ROOT) -> Memory:
    """Ask the system; `root` is where its control groups are looked up."""
    import psutil

    memory = psutil.virtual_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sandboxes do not count the pages that were swapped
        swap = psutil.swap_memory().total
    return Memory(
        total=memory.total, available=memory.available, swap=swap, limit=memory_limit(root)
    )


def device_named(name: str) -> str:
    """Return a torch device; `auto` is the first CUDA device if there is one, else the CPU."""
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def bfloat16_note(device: str) -> str | None:
    """Return a line about products in bfloat16 on a processor without instructions for them.

    Measured with torch 2.13.0 on AVX2: 3 to 5 times float32's time where the second matrix is
    transposed, 45 times where it is not, which is one product in three of a training step.
    """
    import torch

    known = torch.device(device).type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not known or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return (
        "this CPU has no instructions for bfloat16, whose products take 3 to 45 times as long: "
        "--precision float32 is the faster one"
    )


def weight_budget(device: str = "cpu", root: Path = ROOT) -> int:
    """Return how many bytes of weights may stay on a device.

    On the CPU 60 % of the memory that this process may use; on a GPU 80 % of what is free. The
    rest is for activations and everything else.
    """
    import torch

    device = device_named(device)
    if torch.device(device).type == "cuda":
        return int(GPU_SHARE * free_gpu_memory(torch.device(device)))
    return int(CPU_SHARE * read_memory(root).usable)


def free_gpu_memory(device: torch.device) -> int:
    """Return the bytes of a GPU that are free, with those that this process holds in reserve."""
    import torch

    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def memory_limit(root: Path = ROOT) -> int | None:
    """Return the memory that control groups leave this process, bytes; None without a limit."""
    limits = [
        int(text)
        for name in ("memory.max", "memory.limit_in_bytes")
        for text in _read_all(root, "memory", name)
        if text.isdigit() and int(text) < 1 << 60  # version 1 writes a huge number for none
    ]
    return min(limits, default=None)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return how many CPUs' time this process may use; None without a limit."""
    quotas = [_share(*text.split()) for text in _read_all(root, "cpu", "cpu.max")]
    for group in _groups(root, "cpu"):
        parts = [_read(group / f"cpu.cfs_{part}_us") for part in ("quota", "period")]
        quotas.append(_share(*parts) if all(parts) else None)
    return min((quota for quota in quotas if quota is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class Processor:
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


def read_processor(root: Path = ROOT) -> Processor:
    """Ask the system; `root` is where its files on the processor and control groups are."""
    import psutil

    fields = _cpu_fields(root)
    flags = fields.get("flags") or fields.get("features")
    return Processor(
        name=fields.get("model name", ""),
        architecture=platform.machine(),
        flags=None if flags is None else frozenset(flags.split()),
        logical=os.cpu_count() or 1,
        usable=usable_threads(),
        physical=psutil.cpu_count(logical=False),
        quota=cpu_quota(root),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def usable_threads() -> int:
    """Return the hardware threads that are open to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def numa_nodes(root: Path = ROOT) -> int:
    """Return how many nodes of memory the machine has; one where the system does not tell."""
    return max(1, len(list((root / "sys/devices/system/node").glob("node[0-9]*"))))


def cpu_name() -> str:
    """Return the processor's model, its kind where the system does not tell."""
    return _cpu_fields(ROOT).get("model name") or platform.processor() or platform.machine()


def _cpu_fields(root: Path) -> dict[str, str]:
    """Return the first processor's lines of /proc/cpuinfo."""
    pairs = [line.partition(":") for line in _read(root / "proc/cpuinfo").splitlines()]
    return {name.strip().lower(): value.strip() for name, colon, value in reversed(pairs) if colon}


def _share(quota: str, period: str = "100000") -> float | None:
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return None  # `max`, or -1
    return int(quota) / int(period)


def _read_all(root: Path, controller: str, name: str) -> Iterator[str]:
    for group in _groups(root, controller):
        text = _read(group / name)
        if text:
            yield text


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield this process's group of every tree that has the controller, and all above it.

    Inside a container the names are often those of the host, with nothing there; the tree's root is
    then the container's own group. So it is with names that lead out of a namespace (`/../..`).
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            trees = [root / _TREES, root / _TREES / "unified"]
        elif controller in controllers.split(","):
            # One may be a link to the other (`cpu` to `cpu,cpuacct`), or miss.
            trees = [root / _TREES / controllers, root / _TREES / controller]
        else:
            continue
        for tree in dict.fromkeys(trees):
            group = tree / os.path.normpath(f"/{path.lstrip('/')}").lstrip("/")
            while group != tree:
                yield group
                group = group.parent
            yield tree


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA card.

    Attributes:
        name: its model.
        memory: bytes in all; 0 if the driver does not tell.
        free: of them unused at the moment.
        driver: version of the driver; empty if unknown.
        capability: compute capability such as `9.0`; empty if the driver does not tell.
    """

    name: str
    memory: int
    free: int
    driver: str = ""
    capability: str = ""


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """The machine's cards, as their driver knows them, whatever torch was built for.

    Attributes:
        cards: what is known of each.
        failure: why the driver's tool did not answer; None if it did, or there is none.
    """

    cards: tuple[Gpu, ...]
    failure: str | None = None


def read_gpus(root: Path = ROOT, program: str | None = None, timeout: float = _GPU_SECONDS) -> Gpus:
    """Ask the driver's tool, else the driver's own files; no cards without a driver.

    Args:
        root: where the system's files are.
        program: the tool; looked for if not given.
        timeout: longest that it may take, seconds.
    """
    program = program or shutil.which("nvidia-smi")
    if program is None:
        return Gpus(cards=_from_files(root))
    command = [program, f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        failure = f"no end after {timeout:g} s"
    except OSError as error:
        failure = f"cannot be started ({error.strerror or error})"
    else:
        stdout, stderr = (text.decode("utf-8", "replace") for text in (run.stdout, run.stderr))
        if not run.returncode:
            return Gpus(cards=parse_query(stdout))
        failure = " ".join((stdout or stderr).split()) or f"ended with code {run.returncode}"
    return Gpus(cards=_from_files(root), failure=f"{program}: {failure}")


def parse_query(output: str) -> tuple[Gpu, ...]:
    """Return the cards that a query of `nvidia-smi` lists, one a line, memory in MiB."""
    rows = [[cell.strip() for cell in line.rsplit(",", 4)] for line in output.splitlines()]
    return tuple(
        Gpu(
            name=row[0],
            memory=_mebibytes(row[1]),
            free=_mebibytes(row[2]),
            driver=row[3],
            capability=row[4] if row[4][:1].isdigit() else "",
        )
        for row in rows
        if len(row) == 5
    )


def _mebibytes(cell: str) -> int:
    return int(cell) * MIB if cell.isascii() and cell.isdigit() else 0


def _from_files(root: Path) -> tuple[Gpu, ...]:
    """Return the cards in /proc/driver/nvidia, whose memory is not told there."""
    found = []
    for path in sorted((root / "proc/driver/nvidia").glob("gpus/*/information")):
        lines = {}
        with suppress(OSError):  # a card that fell off the bus; it is one all the same
            lines = dict(line.partition(":")[::2] for line in path.read_text().splitlines())
        found.append(Gpu(name=lines.get("Model", "NVIDIA GPU").strip(), memory=0, free=0))
    return tuple(found)
