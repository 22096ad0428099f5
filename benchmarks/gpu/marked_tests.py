"""The repository's own tests for a card, those marked `gpu`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.gpu.kit import Absent, Figure, Kit, Step
from common.errors import printable

_WITHOUT = ("-p", "no:cacheprovider", "-p", "no:benchmark")
"""Plugins that have no part in it; the second, where it is installed, warns of processes."""

_JOBS = 8
"""Processes that compile kernels at the same time; each takes half a gigabyte of the card."""


def tested(kit: Kit, files: Sequence[str], jobs: int) -> Iterator[Figure]:
    """The tests for a card in some files, by so many processes."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *_WITHOUT, *files]
    if not kit.dry and jobs > 1:
        command += ["-n", str(min(jobs, os.cpu_count() or 1)), "--dist", "worksteal"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    said = kit.work / f"{Path(files[0]).stem}.txt"
    said.write_text(done.stdout + done.stderr)
    counts = dict(
        (kind, int(number))
        for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    )
    if not counts.get("passed") and not counts.get("failed"):
        last = (done.stdout + done.stderr).strip().splitlines()[-1:] or [f"code {done.returncode}"]
        raise Absent(f"the gpu tests ran nothing: {printable(last[0], 300)}; all of it: {said}")
    bad = counts.get("failed", 0) + counts.get("error", 0)
    failed = re.findall(r"^(?:FAILED|ERROR) (.+)$", done.stdout, re.MULTILINE)
    reasons = re.findall(r"^E   (.+)$", done.stdout, re.MULTILINE)
    details = {**counts, "names": failed[:50], "reasons": [line[:300] for line in reasons[:50]]}
    yield Figure(name="gpu tests that fail", value=bad, most=0, details=details)


def _step(name: str, seconds: float, jobs: int, *files: str) -> Step:
    return Step(name=name, seconds=seconds, run=partial(tested, files=files, jobs=jobs))


STEPS = (
    _step("rows", 18, 1, "tests/test_device_gpu.py"),
    _step("answers", 12, 1, "tests/test_evaluation_gpu.py"),
    _step("operators", 110, _JOBS, "tests/test_sparse_triton.py", "tests/test_sparse_gpu.py"),
)
"""Of this stage."""
