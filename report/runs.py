"""The results that directories hold, as the page shows them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from common.errors import ResultError
from report.chain import Link, chain_of
from results.bench import BENCH, Bench
from results.card import CARD, Card
from results.density import DENSITY, Density
from results.estimate import ESTIMATE, Estimate
from results.evaluation import EVALUATION, Evaluation
from results.parts import HotNeurons, Layer, ResultFile
from results.predictors import PREDICTORS, PredictorReport, SearchPoint

Document = TypeVar("Document")

FILES = (BENCH, PREDICTORS, EVALUATION, ESTIMATE, DENSITY, CARD)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one directory holds; each result may be missing, not all of them.

    Attributes:
        name: tells the run from the others on the page.
        path: the directory as given.
        chain: what led to the exported file.
    """

    name: str
    path: str
    bench: Bench | None
    predictors: PredictorReport | None
    evaluation: Evaluation | None
    estimate: Estimate | None
    density: Density | None
    card: Card | None
    chain: Sequence[Link] = ()

    @property
    def layers(self) -> Sequence[Layer]:
        """The layers of the benchmark, or else of the predictors' report."""
        if self.bench is not None:
            return self.bench.layers
        return self.predictors.layers if self.predictors is not None else ()

    @property
    def hot(self) -> HotNeurons | None:
        """Activation shares of the benchmark, or else of the predictors' report."""
        measured = None if self.bench is None else self.bench.hot_neurons
        if measured is not None and measured.neuron_share:
            return measured
        return self.predictors.hot() if self.predictors is not None else None

    @property
    def points(self) -> list[SearchPoint]:
        """What the search explored and measured the perplexity of."""
        search = self.predictors.search if self.predictors is not None else ()
        return [point for point in search if point.ppl_gap is not None]


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
    run = Run(
        name=name,
        path=str(directory),
        bench=_read(directory, BENCH),
        predictors=_read(directory, PREDICTORS),
        evaluation=_read(directory, EVALUATION),
        estimate=_read(directory, ESTIMATE),
        density=_read(directory, DENSITY),
        card=_read(directory, CARD),
        chain=chain_of(directory) if directory.is_dir() else (),
    )
    found = (run.bench, run.predictors, run.evaluation, run.estimate, run.density, run.card)
    if not any(found):
        names = ", ".join(file.name for file in FILES)
        raise ResultError(
            f"{directory}: holds none of {names}, nor does a directory in it",
            f"make one with '{BENCH.maker}'",
        )
    return run


def _read(directory: Path, file: ResultFile[Document]) -> Document | None:
    """Read a result in a directory, or else the only one in the directories directly below."""
    own = directory / file.name
    here = [own] if os.path.lexists(own) else _below(directory, file.name)
    if len(here) > 1 and file is BENCH and os.path.lexists(directory / DENSITY.name):
        return None  # the sweep's own, one a density
    if len(here) > 1:
        raise ResultError(
            f"{directory}: {here[0].parent.name} and {here[1].parent.name} both hold {file.name}",
            "pass those directories one by one",
        )
    return file.read(here[0]) if here else None


def _below(directory: Path, name: str) -> list[Path]:
    try:
        return sorted(path for path in directory.glob(f"*/{name}") if path.is_file())
    except OSError as error:
        raise ResultError(f"{directory}: {error.strerror or error}", "check the path") from error
