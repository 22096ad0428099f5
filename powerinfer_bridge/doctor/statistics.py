"""The activation statistics beside a file, by which neurons are chosen for the GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import PspError
from gguf_export.pwri.statistics import read_statistics
from powerinfer_bridge.doctor.finding import Finding, from_error, note, ok, warning

_HOT = 0.1
_EXPORT = "export with predictors from psp train-predictor, which come with statistics"


@dataclass(frozen=True, kw_only=True)
class StatisticsFacts:
    """What lies in `activation/`.

    Attributes:
        n_layers: of the model.
        files: statistics files there, whatever their number.
        foreign: other model files in the same directory, whose statistics these may be.
        counts: per layer, (d_ff,) int64; None if there are none that can be read.
        error: why they cannot be read; None without an error.
    """

    n_layers: int
    files: int
    foreign: tuple[str, ...] = ()
    counts: Sequence[torch.Tensor] | None = None
    error: PspError | None = None


def read_facts(file: Path, n_layers: int, d_ff: int) -> StatisticsFacts:
    """Read the statistics beside a model file."""
    files = len(list((file.parent / "activation").glob("activation_*.pt")))
    others = sorted(path.name for path in file.parent.glob("*.powerinfer.gguf"))
    foreign = tuple(name for name in others if name != file.name)
    counts, error = None, None
    if files:
        try:
            counts = read_statistics(file.parent, n_layers, d_ff)
        except PspError as found:
            error = found
    return StatisticsFacts(
        n_layers=n_layers, files=files, foreign=foreign, counts=counts, error=error
    )


def statistics_findings(facts: StatisticsFacts, *, has_gpu: bool) -> Iterator[Finding]:
    """Judge the statistics: complete, this model's, and of use."""
    if not facts.files:
        found = "no activation/ beside the file: no neurons can be chosen for a GPU"
        yield warning("statistics", found, _EXPORT) if has_gpu else note("statistics", found)
    elif facts.error is not None:
        yield from_error("statistics", facts.error)
    elif facts.counts is not None:
        yield _read(facts, facts.counts)
    if facts.files and facts.foreign:
        found = f"{facts.foreign[0]} lies in the same directory, activation/ can be of one model"
        yield warning("statistics", found, "give every model a directory of its own")


def _read(facts: StatisticsFacts, counts: Sequence[torch.Tensor]) -> Finding:
    if facts.files != facts.n_layers:
        found = f"activation/ holds {facts.files} files, the model has {facts.n_layers} layers"
        return warning("statistics", found, "export again: some are another model's")
    every = torch.cat(list(counts)).sort(descending=True).values
    total = int(every.sum())
    if not total:
        return warning("statistics", "no neuron was ever active", _EXPORT)
    hot = int(every[: max(1, int(_HOT * len(every)))].sum())
    found = f"{facts.n_layers} layers; the hottest {_HOT:.0%} of neurons make {hot / total:.0%}"
    return ok("statistics", f"{found} of all activations")
