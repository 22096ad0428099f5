"""What several runs say together, and what to beware of."""

from __future__ import annotations

from collections.abc import Sequence

from powerinfer_bridge.report.formats import ratio, speed
from powerinfer_bridge.report.results import Bench, Run
from powerinfer_bridge.report.verdict import ARM_TITLES

_ALIKE = {
    "model": "are of different models: their speeds and perplexities do not compare",
    "hardware": "were made on different machines: their speeds do not compare",
    "engine": "ran in different engines: their speeds do not compare",
    "context": "took other perplexity windows: their perplexities do not compare",
    "text": "took other texts: their perplexities and sparsities do not compare",
}


def comparison(runs: Sequence[Run]) -> str | None:
    """Say which of several runs decodes fastest with predictors; None if they do not compare."""
    measured = [run.bench for run in runs if run.bench is not None]
    if any(_unlike(measured, key) for key in ("model", "hardware", "engine")):
        return None
    speeds = [
        (arm.decode.median, run.name)
        for run in runs
        if run.bench is not None and (arm := run.bench.arm("predicted")) is not None
    ]
    if len(speeds) < 2:
        return None
    (first, best), (second, next_best) = sorted(speeds, key=lambda each: -each[0])[:2]
    return (
        f"Fastest of {len(speeds)} with predictors: {best}, {speed(first)} tokens/s, "
        f"{ratio(first / second)} times as fast as {next_best}, the next."
    )


def warnings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return every run's warnings, and those about comparing the runs: whose, and the line."""
    measured = [run.bench for run in runs if run.bench is not None]
    own = [(run.name, line) for run in runs if run.bench for line in _of_run(run.bench)]
    differing = [line for key, line in _ALIKE.items() if _unlike(measured, key)]
    return [("all runs", f"The runs {line}.") for line in differing] + own


def _of_run(bench: Bench) -> list[str]:
    """Return a benchmark's warnings, and what its programs said that a reader must know."""
    notes = ((arm.name, note) for arm in bench.arms for note in arm.notes)
    return [*bench.warnings, *(f"{ARM_TITLES[name]}: {note}" for name, note in notes)]


def _unlike(measured: Sequence[Bench], key: str) -> bool:
    return any(bench.facts.get(key) != measured[0].facts.get(key) for bench in measured[1:])
