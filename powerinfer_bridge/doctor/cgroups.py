"""Limits that a container sets: memory and CPU time of the control groups this process is in.

Version 2 has one tree with `memory.max` and `cpu.max`; version 1 a tree for each kind, with
`memory.limit_in_bytes` and `cpu.cfs_quota_us` (Linux, Documentation/admin-guide/cgroup-v2.rst and
cgroup-v1). A limit of a group holds for all groups in it, so the smallest on the way up counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_TREES = "sys/fs/cgroup"


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return the memory this process may use, bytes; None without a limit."""
    limits = [
        int(text)
        for name in ("memory.max", "memory.limit_in_bytes")
        for text in _read_all(root, "memory", name)
        if text.isdigit() and int(text) < 1 << 60  # version 1 writes a huge number for none
    ]
    return min(limits, default=None)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many CPUs' time this process may use; None without a limit."""
    quotas = [_share(*text.split()) for text in _read_all(root, "cpu", "cpu.max")]
    for group in _groups(root, "cpu"):
        parts = [_read(group / f"cpu.cfs_{part}_us") for part in ("quota", "period")]
        quotas.append(_share(*parts) if all(parts) else None)
    return min((quota for quota in quotas if quota is not None), default=None)


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
