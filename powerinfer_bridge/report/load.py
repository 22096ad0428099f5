"""Finds the results that directories hold."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from powerinfer_bridge.report.bench_document import read_bench
from powerinfer_bridge.report.documents import read_density, read_estimate, read_predictors
from powerinfer_bridge.report.results import Run
from powerinfer_bridge.report.values import ResultError, Value, open_result

MAKERS = {
    "bench.json": "psp bench-powerinfer NAME.powerinfer.gguf --out DIR",
    "report.json": "psp train-predictor --traces DIR --out DIR --report DIR",
    "estimate.json": "psp estimate NAME.powerinfer.gguf --hardware this --bench DIR --out DIR",
    "density.json": "python benchmarks/density.py --powerinfer-bin DIR --tokenizer FILE --out DIR",
}
"""What to run for each result."""

_KINDS = {"bench.json": "psp.bench", "estimate.json": "psp.estimate", "density.json": "psp.density"}


def load_runs(directories: Sequence[Path]) -> list[Run]:
    """Read every result in some directories, or directly below them.

    Raises:
        ResultError: a directory that is missing, given twice or without results; a result that is
            damaged, of another kind or schema, or lacks a key.
    """
    paths = [Path(os.path.abspath(directory)) for directory in directories]
    for path in paths:
        if paths.count(path) > 1:
            raise ResultError(f"{path}: given twice", "name every run once")
    names = _names(paths)
    return [_load(given, name) for given, name in zip(directories, names, strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the last part of each path, more parts where those are the same."""
    longest = max(len(path.parts) for path in paths)
    tails = [
        [os.path.join("", *path.parts[-length:]) for path in paths]
        for length in range(1, longest + 1)
    ]
    return [
        next(tail[number] for tail in tails if tail.count(tail[number]) == 1)
        for number in range(len(paths))
    ]


def _load(directory: Path, name: str) -> Run:
    found = {file: value for file in MAKERS if (value := _open(directory, file)) is not None}
    if not found:
        raise ResultError(
            f"{directory}: holds none of {', '.join(MAKERS)}, nor does a directory in it",
            f"make one with '{MAKERS['bench.json']}'",
        )
    bench, report, estimate, density = (found.get(file) for file in MAKERS)
    return Run(
        name=name,
        path=str(directory),
        bench=None if bench is None else read_bench(bench),
        predictors=None if report is None else read_predictors(report),
        estimate=None if estimate is None else read_estimate(estimate),
        density=None if density is None else read_density(density),
    )


def _open(directory: Path, file: str) -> Value | None:
    """Open a result in a directory, or else the only one in the directories directly below."""
    here = [directory / file] if os.path.lexists(directory / file) else _below(directory, file)
    if len(here) > 1 and file == "bench.json" and os.path.lexists(directory / "density.json"):
        return None  # the sweep's own, one a density
    if len(here) > 1:
        raise ResultError(
            f"{directory}: {here[0].parent.name} and {here[1].parent.name} both hold {file}",
            "pass those directories one by one",
        )
    remedy = f"make it anew with '{MAKERS[file]}'"
    return open_result(here[0], _KINDS.get(file), remedy) if here else None


def _below(directory: Path, file: str) -> list[Path]:
    try:
        return sorted(path for path in directory.glob(f"*/{file}") if path.is_file())
    except OSError as error:
        raise ResultError(f"{directory}: {error.strerror or error}", "check the path") from error
