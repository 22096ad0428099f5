"""PowerInfer's speed against the density of its predictions, on models made for it.

For every density: makes a speed fixture (`benchmarks.speed_fixture`), times real PowerInfer on it
as `psp bench-powerinfer` does, predicted neurons, all neurons and dense in turn, and removes the
fixture. Then `--out` holds `density.json` with one more point, `density.png` and `.svg` of all so
far, and the benchmark's own results in `bench-0.10/`. Points that are there are not measured again.

    python benchmarks/density.py --powerinfer-bin DIR --tokenizer tokenizer.model --out DIR
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from benchmarks.exact_density import FixtureShape
from benchmarks.speed_fixture import FILE, FixtureConfig, make_and_check, shape_options
from common.errors import OutputError, PspError
from common.files import remove_output, sha256, write_error
from common.table import table
from common.typed_json import plain
from common.version import tool_version
from gguf_export.pwri.element_types import OUTTYPES
from powerinfer_bridge.benchmark.run import bench
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.benchmark.setup import this_machine
from report.figures.speed import density_figure
from report.figures.style import save, style
from results.bench import (
    ALL_NEURONS,
    DENSE_LLAMA_CPP,
    DENSE_POWERINFER,
    PREDICTED,
    Bench,
)
from results.density import DENSITY, Density, Point, Shape
from results.parts import Speed

_ARMS = ("predicted", "all_neurons", "dense", "dense_llama_cpp")
"""Arms of a point, in the table's order."""

_CONTEXT, _CHUNKS = 128, 2
"""Enough text to see that the predictions change nothing: speed is the question here."""

Measure = Callable[["DensityConfig", float], Bench]
"""Benchmarks one density."""


@dataclass(frozen=True, kw_only=True)
class DensityConfig:
    """Settings of the sweep.

    Attributes:
        powerinfer_bin: directory of a PowerInfer build.
        tokenizer: SentencePiece `tokenizer.model`.
        out: directory for results.
        densities: shares of neurons predicted, each above 0 and at most 1.
        shape: sizes of the models; its density is replaced.
        outtype: element type of the models' matrices.
        threads: CPU threads.
        repeats: rounds that count.
        generate: tokens that a run decodes.
        llama_cpp_bin: directory of a llama.cpp build, to time the dense file too.
        hardware: what to estimate for, see `psp estimate`; None estimates nothing.
    """

    powerinfer_bin: Path
    tokenizer: Path
    out: Path
    densities: tuple[float, ...]
    shape: FixtureShape
    outtype: str = "f16"
    threads: int = 1
    repeats: int = 5
    generate: int = 32
    llama_cpp_bin: str | None = None
    hardware: str | None = None

    def __post_init__(self) -> None:
        """Refuse a density that cannot be made before any is measured."""
        for density in self.densities:
            self.at(density)

    def at(self, density: float) -> FixtureShape:
        """Return the shape of one density."""
        return replace(self.shape, density=density)

    def sizes(self) -> Shape:
        """Return the sizes that all models share."""
        return Shape(**{key: size for key, size in vars(self.shape).items() if key != "density"})

    def settings(self) -> dict[str, object]:
        """Return what every point of one `density.json` must share, ready for JSON."""
        apart = ("out", "densities", "tokenizer", "shape")
        return {
            **{key: value for key, value in plain(self).items() if key not in apart},
            "tokenizer_sha256": sha256(self.tokenizer.read_bytes()),
            "shape": plain(self.sizes()),
        }


def label(density: float) -> str:
    """Return a density as file names spell it."""
    return f"{density:.2f}" if round(density, 2) == density else f"{density:g}"


def bench_fixture(config: DensityConfig, density: float) -> Bench:
    """Make the fixture of a density, time PowerInfer on it, and remove it."""
    place = config.out / f"fixture-{label(density)}"
    fixture = FixtureConfig(
        shape=config.at(density),
        tokenizer=config.tokenizer,
        out=place,
        outtype=config.outtype,
        dense=True,
    )
    remove_output(place)  # of a run that was killed
    try:
        make_and_check(fixture)
        return bench(
            BenchConfig(
                file=fixture.bundle.model_file,
                dense_gguf=fixture.bundle.dense_file,
                powerinfer_bin=config.powerinfer_bin,
                llama_cpp_bin=config.llama_cpp_bin,
                hardware=config.hardware,
                threads=config.threads,
                repeats=config.repeats,
                generate=config.generate,
                context=_CONTEXT,
                chunks=_CHUNKS,
                out=config.out / f"bench-{label(density)}",
                force=True,
            )
        )
    finally:
        remove_output(place)


def point(shape: FixtureShape, measured: Bench) -> Point:
    """Return what a benchmark says of one density."""
    speeds = {
        arm.name: Speed(
            tokens_per_second=arm.decode.tokens_per_second, quartiles=arm.decode.quartiles
        )
        for arm in measured.arms
    }
    estimate = measured.estimate
    return Point(
        density=shape.exact_density,
        density_wanted=shape.density,
        dense=speeds.get(DENSE_POWERINFER),
        predicted=speeds[PREDICTED],
        all_neurons=speeds[ALL_NEURONS],
        dense_llama_cpp=speeds.get(DENSE_LLAMA_CPP),
        speedup=next(each for each in measured.speedups if each.over == ALL_NEURONS),
        estimate=None if estimate is None else estimate.tokens_per_second,
        ppl_gap=measured.ppl_gap,
        greedy_text_same=bool(measured.greedy_text_same),
    )


def begin(config: DensityConfig) -> Density:
    """Return the document to add points to: the one in `out`, or a new one.

    Raises:
        PspError: one with other settings, of another machine or damaged is there.
    """
    new = Density(
        tool_version=tool_version(),
        shape=config.sizes(),
        hardware=this_machine().facts,
        threads=config.threads,
        settings=config.settings(),
        points=(),
    )
    file = config.out / DENSITY.name
    if not file.exists():
        return new
    found = DENSITY.read(file, "choose another --out")
    if differing := _differing(new, found):
        raise OutputError(
            f"{file} was measured with another {' and '.join(differing)}",
            "go on as it began, or choose another --out",
        )
    return found


def _differing(new: Density, found: Density) -> list[str]:
    """Return what keeps points from standing in one document, by name."""
    keys = ("tool_version", "hardware")
    settings = [key for key, value in new.settings.items() if found.settings.get(key) != value]
    return [key for key in keys if getattr(found, key) != getattr(new, key)] + settings


def run(config: DensityConfig, measure: Measure = bench_fixture) -> Density:
    """Measure the densities that are not measured yet; every one is kept at once.

    Raises:
        PspError: other settings in `out`, a fixture that cannot be made, or an engine that fails.
    """
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(config.out, error) from error
    document = begin(config)
    done = {each.density_wanted for each in document.points}
    wanted = [density for density in dict.fromkeys(config.densities) if density not in done]
    for density in tqdm(wanted, unit="density", disable=None):
        found = point(config.at(density), measure(config, density))
        points = sorted([*document.points, found], key=lambda each: each.density)
        document = replace(document, points=tuple(points))
        DENSITY.write(config.out, document)
        draw(document, config.out)
    return document


def draw(document: Density, out: Path) -> None:
    """Write the picture as PNG and SVG."""
    shape, threads = document.shape, document.threads
    with style():
        figure = density_figure(document.points, width=6.4)
        figure.axes[0].set_title(
            f"{shape.n_layers} layers of d_model {shape.d_model}, d_ff {shape.d_ff}, rank "
            f"{shape.rank}; {threads} {'thread' if threads == 1 else 'threads'}",
            loc="left",
        )
        save(figure, out, "density")


def lines(document: Density) -> str:
    """Return the table of the medians, in tokens per second, and what predictions gain."""
    arms = [arm for arm in _ARMS if any(getattr(each, arm) for each in document.points)]
    rows = [
        [
            f"{each.density:.4f}",
            *(_median(getattr(each, arm)) for arm in arms),
            f"{each.speedup.ratio:.2f}",
        ]
        for each in document.points
    ]
    names = [arm.replace("_", " ") for arm in arms]
    return table(["density", *names, "predicted / all"], rows)


def _median(speed: Speed | None) -> str:
    return "–" if speed is None else f"{speed.tokens_per_second:.2f}"


def read_densities(_: click.Context, option: click.Parameter, value: str) -> tuple[float, ...]:
    """Read `0.1,0.5`."""
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no list of numbers such as 0.1,0.5") from error


@click.command()
@click.option("--powerinfer-bin", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--tokenizer", type=FILE, required=True, help="A LLaMA's tokenizer.model.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="For results.")
@click.option(
    "--densities",
    default="0.05,0.1,0.2,0.3,0.5,0.75,1",
    show_default=True,
    callback=read_densities,
)
@click.option("--threads", default=1, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("-n", "--generate", default=32, show_default=True, help="Tokens a run decodes.")
@click.option("--llama-cpp-bin", help="Time the dense file in llama.cpp too.")
@click.option("--hardware", help="Estimate for this: see psp estimate.")
@click.option("--outtype", type=click.Choice(list(OUTTYPES)), default="f16", show_default=True)
@shape_options
def main(**options: Any) -> None:
    """Run the sweep."""
    sizes = {field.name: options.pop(field.name) for field in fields(Shape)}
    try:
        config = DensityConfig(shape=FixtureShape(density=1, **sizes), **options)
        click.echo(lines(run(config)))
    except PspError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
