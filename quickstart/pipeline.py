"""The quickstart's steps: corpus, model, then the code of `psp run`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common.errors import OutputError
from common.sealed import read_sealed, write_sealed
from common.version import tool_version
from pipeline.layout import Layout
from pipeline.plan import prepare
from pipeline.run import execute
from pipeline.settings import RunConfig
from pipeline.state import STATE, RunState
from quickstart.model import Corpus, train_model, write_corpus, write_untrained
from quickstart.settings import SIZES, QuickstartConfig, Size
from report.page import write_page
from report.settings import ReportConfig
from results.bench import Bench
from results.evaluation import Evaluation

_NAME = "quickstart"
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
        evaluation: directory of the evaluation, if there is one.
        page: HTML page of all results, the evaluation's too.
    """

    def __init__(self, out: Path) -> None:
        """Name them."""
        self.out = out
        self.corpus = Corpus(out / "corpus")
        self.untrained = out / "untrained"
        self.model = out / "model"
        made = Layout(out, _NAME)
        self.traces, self.predictors = made.traces, made.predictors
        self.bundle, self.result = made.bundle, made.result
        self.evaluation = out / "evaluation"
        self.page = self.evaluation / "report.html"

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
    return _run(config, size, paths), paths


def evaluated(config: QuickstartConfig, paths: Paths, note: Callable[[str], None]) -> Evaluation:
    """Ask the model, its predictors and the exported file the questions of the suite `tiny`.

    They are made of the held-out text. Answers that are known are not asked for again.

    Args:
        config: settings.
        paths: of a quickstart that has been run.
        note: takes lines that a reader must know.

    Raises:
        PspError: see `evaluation.run.evaluate`.
    """
    from evaluation.run import evaluate
    from evaluation.settings import EvaluateConfig

    settings = EvaluateConfig(
        model=(str(paths.model),),
        suite="tiny",
        data=paths.corpus.valid,
        predictors=(paths.predictors,),
        gguf=(paths.bundle.model_file,),
        limit=SIZES[config.size].questions,
        output_path=paths.evaluation,
        device="cpu",
        seed=config.seed,
        resume=True,
    )
    result = evaluate(settings, note)
    write_page(ReportConfig(directories=(config.out,), out=paths.page, force=True))
    return result


def _claim(config: QuickstartConfig) -> None:
    """Start a directory, or make sure that it was started with the same settings."""
    settings = {"size": config.size, "seed": config.seed}
    marker = config.out / "quickstart.json"
    if marker.exists():
        found = read_sealed(marker, OutputError, "choose another --out").get("settings")
        if found != settings:
            raise OutputError(
                f"{config.out}: holds a quickstart with {found}, not {settings}",
                "choose another --out or remove it",
            )
        return
    if config.out.exists() and not (config.out.is_dir() and not any(config.out.iterdir())):
        raise OutputError(f"{config.out}: exists and is no quickstart", "choose another --out")
    write_sealed(marker, {"settings": settings, "tool_version": tool_version()})


def _run(config: QuickstartConfig, size: Size, paths: Paths) -> Bench:
    settings = RunConfig(
        model=str(paths.model),
        data=str(paths.corpus.train),
        eval_data=str(paths.corpus.valid),
        out=config.out,
        name=_NAME,
        tokens=size.trace_tokens,
        context=size.context,
        rank=size.rank,
        chunks=size.chunks,
        prompt="def main(",
        generate=size.generate,
        repeats=_ROUNDS,
        threads=config.threads,
        seed=config.seed,
        powerinfer_bin=config.powerinfer_bin,
        resume=True,
    )
    if not (config.out / STATE).exists():
        RunState(config.out).write()
    return execute(prepare(settings)).bench
