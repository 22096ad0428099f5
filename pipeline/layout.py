"""Where everything that a run makes lies."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from architectures.gguf_model.source import local_path
from gguf_export.bundle import Bundle
from gguf_export.settings import SUFFIX
from pipeline.settings import RunConfig
from pipeline.state import STATE
from results.bench import BENCH

_NUMBER = re.compile(r"-[0-9]{5}-of-[0-9]{5}$")


@dataclass(frozen=True)
class Layout:
    """The paths in a run's directory.

    Attributes:
        out: the directory.
        name: of the PowerInfer file, without its ending.
    """

    out: Path
    name: str

    @classmethod
    def of(cls, config: RunConfig) -> Layout:
        """Return the layout of a run."""
        return cls(config.out, config.name or _own_name(config.model))

    @property
    def sparse_model(self) -> Path:
        """The model after `--sparsify`."""
        return self.out / "sparse-model"

    @property
    def held_out(self) -> Path:
        """Documents of the text that no trace is made of."""
        return self.out / "held-out.jsonl"

    @property
    def traces(self) -> Path:
        """The trace store."""
        return self.out / "traces"

    @property
    def predictors(self) -> Path:
        """The predictor artifact."""
        return self.out / "predictors"

    @property
    def export(self) -> Path:
        """Directory of the bundle."""
        return self.out / "export"

    @property
    def bundle(self) -> Bundle:
        """What PowerInfer runs."""
        return Bundle.beside(self.export / f"{self.name}{SUFFIX}")

    @property
    def verified(self) -> Path:
        """What `psp verify` found, JSON."""
        return self.out / "verify.json"

    @property
    def bench(self) -> Path:
        """Directory of the benchmark's journal and samples."""
        return self.out / "bench"

    @property
    def result(self) -> Path:
        """The benchmark's document."""
        return self.out / BENCH.name

    @property
    def predictor_report(self) -> Path:
        """Directory of the predictors' metrics, curves and figures."""
        return self.out / "predictor-report"

    def owns(self, path: Path) -> bool:
        """Whether a path is one that a run makes."""
        made = (
            *(self.sparse_model, self.held_out, self.traces, self.predictors, self.export),
            *(self.verified, self.bench, self.result, self.predictor_report, self.page),
            self.out / STATE,
        )
        return any(path.resolve().is_relative_to(each.resolve()) for each in made)

    @property
    def page(self) -> Path:
        """The HTML page of all results."""
        return self.out / "report.html"


def _own_name(model: str) -> str:
    """Return what a model is called, of a file without its ending and its number in a set."""
    path = local_path(model)
    if path.suffix != ".gguf":
        return path.resolve().name
    name = path.stem if path.exists() else path.stem.rpartition(":")[2]  # OWNER/NAME:FILE.gguf
    return _NUMBER.sub("", name).removesuffix(".powerinfer")
