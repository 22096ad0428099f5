"""The quickstart's steps: corpus, model, then the code of the four commands."""

from __future__ import annotations

from pathlib import Path

from common.errors import OutputError
from common.files import read_json, write_json
from common.version import tool_version
from gguf_export.bundle import Bundle, export
from gguf_export.settings import ExportConfig
from powerinfer_bridge.benchmark.run import bench
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.verify.verification import ExportCheck
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig
from quickstart.model import Corpus, train_model, write_corpus, write_untrained
from quickstart.settings import SIZES, QuickstartConfig, Size
from results.bench import BENCH, Bench

_ROUNDS = 3
"""Of the benchmark; more would make speeds of a model this small no less meaningless."""


class Paths:
    """Where each step puts its result.

    Attributes:
        out: the directory of everything.
        corpus: text of both splits.
        untrained: the random model that training starts from.
        model: Hugging Face checkpoint.
        traces: trace store.
        predictors: predictor artifact.
        bundle: export bundle.
        result: benchmark result, JSON.
    """

    def __init__(self, out: Path) -> None:
        """Name them."""
        self.out = out
        self.corpus = Corpus(out / "corpus")
        self.untrained = out / "untrained"
        self.model = out / "model"
        self.traces = out / "traces"
        self.predictors = out / "predictors"
        self.bundle = Bundle.beside(out / "export" / "quickstart.powerinfer.gguf")
        self.result = out / BENCH.name

    def all(self) -> dict[str, Path]:
        """Return every path by what it holds."""
        return {
            "training text": self.corpus.train,
            "held-out text": self.corpus.valid,
            "model": self.model,
            "traces": self.traces,
            "predictors": self.predictors,
            "PowerInfer model": self.bundle.model_file,
            "PowerInfer predictors": self.bundle.predictor_directory,
            "activation statistics": self.bundle.activation_directory,
            "benchmark": self.result,
        }


def quickstart(config: QuickstartConfig) -> tuple[Bench, Paths]:
    """Run every step that is not finished yet.

    Returns:
        The benchmark's document and all paths.

    Raises:
        PspError: a step failed, or `out` holds a quickstart with other settings.
    """
    size = SIZES[config.size]
    paths = Paths(config.out)
    _claim(config)
    if not (paths.untrained / "config.json").exists():
        corpus = write_corpus(paths.corpus.directory, characters=size.characters, seed=config.seed)
        write_untrained(corpus, paths.untrained, size, config.seed)
    if not (paths.model / "config.json").exists():
        train_model(paths.corpus, paths.untrained, paths.model, size, config.seed)
    _predict(config, size, paths)
    if not paths.bundle.model_file.exists():
        export(
            ExportConfig(
                model=str(paths.model),
                predictors=paths.predictors,
                out=paths.bundle.model_file,
                force=True,
            ),
            ExportCheck(str(paths.model), paths.bundle.model_file),
        )
    return _bench(config, size, paths), paths


def _claim(config: QuickstartConfig) -> None:
    """Start a directory, or make sure that it was started with the same settings."""
    settings = {"size": config.size, "seed": config.seed}
    marker = config.out / "quickstart.json"
    if marker.exists():
        found = read_json(marker, OutputError, "choose another --out").get("settings")
        if found != settings:
            raise OutputError(
                f"{config.out}: holds a quickstart with {found}, not {settings}",
                "choose another --out or remove it",
            )
        return
    if config.out.exists() and not (config.out.is_dir() and not any(config.out.iterdir())):
        raise OutputError(f"{config.out}: exists and is no quickstart", "choose another --out")
    write_json(marker, {"settings": settings, "tool_version": tool_version()})


def _predict(config: QuickstartConfig, size: Size, paths: Paths) -> None:
    collect(
        CollectConfig(
            model=str(paths.model),
            data=str(paths.corpus.train),
            out=paths.traces,
            tokens=size.trace_tokens,
            context=size.context,
            seed=config.seed,
            resume=True,
        )
    )
    train_predictors(
        TrainConfig(
            traces=paths.traces,
            out=paths.predictors,
            rank=size.rank,
            seed=config.seed,
            resume=True,
        )
    )


def _bench(config: QuickstartConfig, size: Size, paths: Paths) -> Bench:
    settings = BenchConfig(
        file=paths.bundle.model_file,
        powerinfer_bin=config.powerinfer_bin,
        data=str(paths.corpus.valid),
        context=size.context,
        chunks=size.chunks,
        prompt="def main(",
        generate=size.generate,
        repeats=_ROUNDS,
        threads=config.threads,
    )
    if paths.result.exists():
        found = BENCH.read(paths.result, f"remove {paths.result}")
        if found.settings == settings.document():
            return found
    result = bench(settings)
    BENCH.write(paths.out, result)
    return result
