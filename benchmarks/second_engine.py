"""PowerInfer's two engines and llama.cpp on models whose activity is exactly known.

For every density: makes a speed fixture (`benchmarks.speed_fixture`) in Q4_0, exports it for both
engines and for llama.cpp, times all of them in turn, prints one JSON line for each number of
threads, and removes the fixture. The second engine tells which share of the neurons it found
active; where that is not the fixture's density, nothing is measured.

    python benchmarks/second_engine.py --tokenizer tokenizer.model --work DIR \
        --powerinfer-bin DIR --second-engine-bin DIR --llama-cpp-bin DIR > lines.jsonl
    python benchmarks/second_engine.py --draw lines.jsonl --out DIR
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from benchmarks.density import read_densities
from benchmarks.exact_density import FixtureShape
from benchmarks.shared import print_line
from benchmarks.speed_fixture import FILE, FixtureConfig, make_fixture, shape_options
from common.errors import EngineError, PspError
from common.files import remove_output
from gguf_export.dense import export_single
from gguf_export.pwri.schema import DENSE_THRESHOLD
from gguf_export.settings import ExportConfig
from gguf_export.smallthinker.file import write_one_expert
from gguf_export.smallthinker.types import ExpertTypes
from gguf_export.tokens.model_vocabulary import read_vocabulary
from powerinfer_bridge.benchmark.rounds import arm_order, quartiles
from powerinfer_bridge.benchmark.setup import this_machine
from powerinfer_bridge.programs.llama_cpp import LlamaCpp
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.programs.sample import RunSample
from powerinfer_bridge.programs.second_engine import SecondEngine
from report.figures.style import ACCENT, DARK, GREY, MIDDLE, TEAL, new_figure, save

_PROMPT = "The first thing to know about"
_CONTEXT = 128
_BASE = "llama_cpp"
"""What the others are told as multiples of."""

LOOKS = {
    "second_engine": ("second engine, exact sparsity", ACCENT, "o"),
    "first_engine": ("first engine, predictors", DARK, "s"),
    "second_engine_all": ("second engine, all neurons", TEAL, "^"),
    "first_engine_all": ("first engine, all neurons", MIDDLE, "v"),
    "llama_cpp": ("llama.cpp, dense", GREY, "D"),
}
"""By arm: title, colour and marker, the first that a reader looks for first."""

Run = Callable[[int], RunSample]
"""Decodes with so many threads."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Settings of the sweep.

    Attributes:
        tokenizer: SentencePiece `tokenizer.model`.
        work: directory for one fixture at a time.
        powerinfer_bin: a build of the first engine.
        second_engine_bin: a build of the second.
        llama_cpp_bin: a build of llama.cpp.
        shape: sizes of the models; its density is replaced.
        densities: shares of neurons that are active.
        threads: numbers of CPU threads.
        repeats: rounds that count; one before them does not.
        generate: tokens that a run decodes.
    """

    tokenizer: Path
    work: Path
    powerinfer_bin: Path
    second_engine_bin: Path
    llama_cpp_bin: Path
    shape: FixtureShape
    densities: tuple[float, ...]
    threads: tuple[int, ...]
    repeats: int
    generate: int


@dataclass(frozen=True, kw_only=True)
class Files:
    """One model for each engine, all of Q4_0 but for the first engine's head (F16)."""

    first: Path
    second: Path
    dense: Path

    def sizes(self) -> dict[str, int]:
        """Return their bytes by engine."""
        return {name: path.stat().st_size for name, path in vars(self).items()}


def make_files(config: SweepConfig, density: float, place: Path) -> Files:
    """Write a fixture and the files of all engines."""
    shape = replace(config.shape, density=density)
    fixture = FixtureConfig(
        shape=shape, tokenizer=config.tokenizer, out=place, outtype="q4_0", keep_model=True
    )
    first = make_fixture(fixture).model_file
    model = place / fixture.name
    second = place / "second.smallthinker.gguf"
    export_single(ExportConfig(model=str(model), engine="smallthinker", out=second))
    dense, checkpoint = place / "dense.gguf", Checkpoint.open(str(model))
    rows = checkpoint.shape.vocab_size
    vocabulary = read_vocabulary(checkpoint.directory, rows, checkpoint.config)
    types = ExpertTypes(weights="q4_0", pure=True)
    write_one_expert(checkpoint, vocabulary, types, dense, dense)
    remove_output(model)  # it is larger than all files
    return Files(first=first, second=second, dense=dense)


def arms(config: SweepConfig, files: Files) -> dict[str, Run]:
    """Return what is timed, by name."""
    first, second = PowerInfer(config.powerinfer_bin), SecondEngine(config.second_engine_bin)
    llama_cpp = LlamaCpp(config.llama_cpp_bin)
    second.check(files.second)

    def sparse(threads: int, threshold: float | None) -> RunSample:
        sizes = {"threads": threads, "context": _CONTEXT}
        return first.generate(files.first, _PROMPT, config.generate, threshold=threshold, **sizes)

    def exact(threads: int, file: Path) -> RunSample:
        return second.generate(file, _PROMPT, config.generate, threads=threads, context=_CONTEXT)

    return {
        "second_engine": partial(exact, file=files.second),
        "second_engine_all": partial(exact, file=files.dense),
        "first_engine": partial(sparse, threshold=None),
        "first_engine_all": partial(sparse, threshold=DENSE_THRESHOLD),
        _BASE: lambda threads: llama_cpp.bench(files.dense, 0, config.generate, threads=threads),
    }


def measure(timed: Mapping[str, Run], threads: int, repeats: int) -> dict[str, list[RunSample]]:
    """Return the runs of each arm, round by round in another order, without those that warm up."""
    names, kept = list(timed), {name: list[RunSample]() for name in timed}
    for number in tqdm(range(repeats + 1), unit="round", disable=None):
        for index in arm_order(len(names), number):
            run = timed[names[index]](threads)
            if number:
                kept[names[index]].append(run)
    return kept


def check_activity(runs: Mapping[str, Sequence[RunSample]], density: float) -> None:
    """Demand that the engines computed what the fixture says.

    Raises:
        EngineError: the second engine found other neurons active, or both wrote other texts.
    """
    for run in runs["second_engine"]:
        found = run.device.get("active_share")
        if not isinstance(found, float) or not math.isclose(found, density, rel_tol=1e-6):
            raise EngineError(
                f"the second engine found {found} of the neurons active, expected {density}",
                "this is a bug, or it computes wrongly",
            )


def summary(runs: Mapping[str, Sequence[RunSample]]) -> dict[str, dict[str, Any]]:
    """Return median speeds, and the ratios to llama.cpp round by round."""
    speeds = {name: [run.decode.tokens_per_second for run in found] for name, found in runs.items()}
    return {
        name: {
            "tokens_per_second": statistics.median(found),
            "quartiles": quartiles(found),
            "ratio": statistics.median(found) / statistics.median(speeds[_BASE]),
            "ratio_quartiles": quartiles(
                [ours / theirs for ours, theirs in zip(found, speeds[_BASE], strict=True)]
            ),
        }
        for name, found in speeds.items()
    }


def sweep(config: SweepConfig) -> Iterator[dict[str, Any]]:
    """Yield one document for each density and number of threads.

    Raises:
        PspError: a fixture that cannot be made, or an engine that fails.
    """
    machine = this_machine().facts
    for wanted in config.densities:
        place = config.work / f"fixture-{wanted:g}"
        remove_output(place)  # of a run that was killed
        try:
            files = make_files(config, wanted, place)
            shape, timed = replace(config.shape, density=wanted), arms(config, files)
            for threads in config.threads:
                runs = measure(timed, threads, config.repeats)
                check_activity(runs, shape.exact_density)
                yield {
                    "density": shape.exact_density,
                    "shape": {k: v for k, v in asdict(shape).items() if k != "density"},
                    "threads": threads,
                    "repeats": config.repeats,
                    "generate": config.generate,
                    "bytes": files.sizes(),
                    "cpu": machine.cpu,
                    "cpus": machine.cpus,
                    "texts_same": len({runs[name][0].text for name in runs if name != _BASE}) == 1,
                    "arms": summary(runs),
                }
        finally:
            remove_output(place)


def draw(documents: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write the picture: speed over llama.cpp's by sparsity, a panel a shape and threads."""
    from report.figures.style import style

    panels: dict[tuple[int, int, int, int], list[Mapping[str, Any]]] = {}
    for each in documents:
        sizes = each["shape"]
        key = (sizes["d_model"], sizes["d_ff"], sizes["n_layers"], each["threads"])
        panels.setdefault(key, []).append(each)
    with style():
        figure = new_figure(3.3 * len(panels) + 0.3, 3.4)
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for plot, (key, found) in zip(axes, sorted(panels.items(), reverse=True), strict=True):
            _panel(plot, key, sorted(found, key=lambda each: -each["density"]))
        axes[0].set_ylim(bottom=0)
        axes[0].set_ylabel("tokens/s, over llama.cpp's")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        save(figure, out, "second-engine")


def _panel(plot: Any, key: tuple[int, int, int, int], found: Sequence[Mapping[str, Any]]) -> None:
    d_model, d_ff, layers, threads = key
    sparsity = [100 * (1 - each["density"]) for each in found]
    for name, (title, colour, marker) in LOOKS.items():
        ratios = [each["arms"][name]["ratio"] for each in found]
        plot.plot(sparsity, ratios, color=colour, marker=marker, markersize=4, label=title)
        bounds = zip(*(each["arms"][name]["ratio_quartiles"] for each in found), strict=True)
        plot.fill_between(sparsity, *bounds, color=colour, alpha=0.15, linewidth=0)
    named = "1 thread" if threads == 1 else f"{threads} threads"
    plot.set_title(f"{layers} layers, {d_model} × {d_ff}, {named}", loc="left")
    plot.set_xlabel("sparsity, %")
    plot.set_xticks(sparsity)


@click.command()
@click.option("--draw", "lines", type=FILE, help="Draw this output instead of measuring.")
@click.option("--out", type=click.Path(path_type=Path), default=".", help="For the picture.")
@click.option("--work", type=click.Path(path_type=Path), help="For fixtures; they are removed.")
@click.option("--tokenizer", type=FILE, help="A LLaMA's tokenizer.model.")
@click.option("--powerinfer-bin", type=click.Path(exists=True, path_type=Path))
@click.option("--second-engine-bin", type=click.Path(exists=True, path_type=Path))
@click.option("--llama-cpp-bin", type=click.Path(exists=True, path_type=Path))
@click.option("--densities", default="0.2,0.1,0.05", show_default=True, callback=read_densities)
@click.option("--threads", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("-n", "--generate", default=16, show_default=True, help="Tokens a run decodes.")
@shape_options
def main(lines: Path | None, out: Path, **options: Any) -> None:
    """Run the sweep, or draw one."""
    try:
        if lines is not None:
            draw([json.loads(line) for line in lines.read_text().splitlines()], out)
            return
        missing = [name for name in ("work", "tokenizer") if options[name] is None]
        missing += [name for name in options if name.endswith("_bin") and options[name] is None]
        if missing:
            raise click.UsageError(f"--{missing[0].replace('_', '-')} is missing")
        sizes = {key: options.pop(key) for key in asdict(FixtureShape(density=1)) if key in options}
        config = SweepConfig(shape=FixtureShape(density=1, **sizes), **options)
        for document in sweep(config):
            print_line(document)
    except PspError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
