"""S2, S3 and the FFN made of them: right, and how far from what memory allows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.commands import psp
from benchmarks.gpu.kit import Absent, Figure, Kit, Step
from common.errors import printable

_SPARSITY = "0.67,0.88,0.95"
_AIMED = "88 %"
_DRY = ("--shape", "256,1024", "--repeats", "3")
_TESTS = ("tests/test_sparse_triton.py", "tests/test_sparse_gpu.py")
_WITHOUT = ("-p", "no:cacheprovider", "-p", "no:benchmark")
"""Plugins that have no part in it; the second, where it is installed, warns of processes."""

_JOBS = 8
"""Processes that compile kernels at the same time; each takes half a gigabyte of the card."""


def tests(kit: Kit) -> Iterator[Figure]:
    """The repository's own tests of the kernels on a card."""
    yield from tested(kit, _TESTS, _JOBS)


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


def _measured(kit: Kit, words: Sequence[str]) -> Iterator[Figure]:
    """What `psp bench-operators` says with some options."""
    if kit.dry:
        words = (*(word for word in words if word != "--tune"), *_DRY)
    found = psp("bench-operators", *words, "--sparsity", _SPARSITY, "--device", kit.device)
    yield from figures(found)


def traced(kit: Kit) -> Iterator[Figure]:
    """The neurons of real tokens, by the traces of the smoke stage."""
    traces = kit.work / "traces-cpu"
    if not traces.exists():
        raise Absent("no traces: run the stage smoke before")
    repeats = ("--repeats", 3) if kit.dry else ()
    yield from figures(
        psp("bench-operators", "--pattern", traces, "--device", kit.device, *repeats)
    )


def figures(document: dict[str, Any]) -> Iterator[Figure]:
    """Yield what a document of `psp bench-operators` says, the issue's aims beside it."""
    shape = document["shape"]
    what = f"{shape['d_model']}×{shape['d_ff']} {document['dtype']} {document['pattern']}"
    for row in document["sparsities"]:
        aimed = row["label"] == _AIMED
        place = f"{what} {row['label']}"
        kept = {key: value for key, value in row.items() if key not in ("samples", "eager")}
        kept |= {"launches": document.get("launches"), "tuning": document.get("tuning")}
        eager = row.get("eager")
        if eager:
            kept["eager"] = {key: value for key, value in eager.items() if key != "samples"}
        for name in ("s2", "s3"):
            title = name.upper()
            bound = row[f"{name}_bandwidth_bound_ratio"]
            yield Figure(name=f"{title} {place}", value=1e6 * row[f"{name}_seconds"], unit="µs")
            if bound is not None:
                most = 2.0 if aimed else None
                yield Figure(
                    name=f"{title} over the bound {place}", value=bound, unit="×", most=most
                )
            yield Figure(
                name=f"{title} against dense {place}",
                value=row[f"{name}_speedup"],
                unit="×",
                least=4.0 if aimed else None,
            )
        yield Figure(
            name=f"FFN against dense {place}",
            value=row["ffn_speedup"],
            unit="×",
            least=2.0 if aimed else None,
            details=kept,
        )


def _step(name: str, seconds: float, *words: str) -> Step:
    return Step(name=name, seconds=seconds, run=partial(_measured, words=words))


STEPS = (
    _step("7b-float16", 12, "--shape", "7b", "--dtype", "float16"),
    Step(name="tests", seconds=30, run=tests),
    _step("13b-float16", 4, "--shape", "13b", "--dtype", "float16"),
    _step("7b-bfloat16", 4, "--shape", "7b", "--dtype", "bfloat16"),
    _step("7b-float16-clustered", 3, "--shape", "7b", "--pattern", "clustered"),
    _step("13b-bfloat16", 3, "--shape", "13b", "--dtype", "bfloat16"),
    Step(name="traced", seconds=3, run=traced),
    _step("7b-float16-tuned", 40, "--shape", "7b", "--dtype", "float16", "--tune"),
)
"""Of this stage."""
