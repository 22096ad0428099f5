"""Disks: room where outputs go and where temporary files go."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from powerinfer_bridge.doctor.finding import GIB, Finding, ok, problem, size, warning


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


def read_disk(directory: Path) -> DiskFacts:
    """Look at a directory, which need not be there yet."""
    path = directory.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    free, writable = shutil.disk_usage(path).free, os.access(path, os.W_OK | os.X_OK)
    return DiskFacts(path=path, free=free, writable=writable)


def temporary_disk() -> DiskFacts:
    """Look at where temporary files go."""
    return read_disk(Path(os.environ.get("TMPDIR") or tempfile.gettempdir()))


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
