"""Speed against density: the sweep goes on where it stopped, and its picture shows all of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up_results
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import refused
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer

from benchmarks import density
from benchmarks.density import DensityConfig, label, lines, run
from benchmarks.exact_density import FixtureShape
from common.errors import EngineError, ExportError, OutputError, ResultError
from common.sealed import read_sealed
from common.typed_json import parse, plain
from powerinfer_bridge.benchmark.setup import this_machine
from report.figures.speed import density_figure
from results.bench import Bench, Expectation, RoundSpeeds
from results.density import DENSITY, Density

TINY = FixtureShape(density=1, d_model=64, d_ff=1024, n_heads=4, n_layers=2, rank=32)
ESTIMATES = {"predicted": 30.0, "all_neurons": 11.0, "dense": 12.0}


def speed(median: float) -> RoundSpeeds:
    return RoundSpeeds(
        tokens_per_second=median,
        quartiles=(0.9 * median, 1.2 * median),
        range=(0.5 * median, 2 * median),
        rounds=5,
    )


class FakeBench:
    """Answers as the benchmark does, and keeps what it was asked."""

    def __init__(self, *, estimate: bool = False, fails_at: float | None = None) -> None:
        self.asked: list[float] = []
        self._estimate, self._fails_at = estimate, fails_at

    def __call__(self, config: DensityConfig, wanted: float) -> Bench:
        if wanted == self._fails_at:
            raise EngineError("the engine stopped; start it again")
        self.asked.append(wanted)
        speeds = {"predicted": 10 / wanted, "all_neurons": 10.0, "dense_powerinfer": 11.0}
        if config.llama_cpp_bin:
            speeds["dense_llama_cpp"] = 12.0
        made = parse(Bench, made_up_results.bench())
        over = made.over("all_neurons")
        assert over is not None
        return replace(
            made,
            arms=tuple(
                replace(arm, decode=speed(speeds[arm.name]))
                for arm in made.arms
                if arm.name in speeds
            ),
            speedups=(replace(over, ratio=1 / wanted, quartiles=(0.5 / wanted, 2 / wanted)),),
            estimate=Expectation(hardware="made up", tokens_per_second={**ESTIMATES})
            if self._estimate
            else None,
            ppl_gap=0.0,
            greedy_text_same=True,
        )


def make_config(directory: Path, tokenizer_bytes: bytes) -> DensityConfig:
    tokenizer = directory / "tokenizer.model"
    tokenizer.write_bytes(tokenizer_bytes)
    out = directory / "sweep"
    out.mkdir()
    return DensityConfig(
        powerinfer_bin=directory, tokenizer=tokenizer, out=out, densities=(0.5, 0.05), shape=TINY
    )


@pytest.fixture
def config(tokenizer_bytes: bytes, tmp_path: Path) -> DensityConfig:
    return make_config(tmp_path, tokenizer_bytes)


@pytest.fixture(scope="module")
def swept(tokenizer_bytes: bytes, tmp_path_factory: pytest.TempPathFactory) -> DensityConfig:
    """A finished sweep, which no test may change."""
    config = make_config(tmp_path_factory.mktemp("swept"), tokenizer_bytes)
    run(config, FakeBench())
    return config


@pytest.fixture
def document(swept: DensityConfig) -> dict[str, Any]:
    """Return what the finished sweep holds."""
    return read_sealed(swept.out / "density.json", ResultError, "")


def test_points_hold_what_the_benchmark_said(config: DensityConfig) -> None:
    sweep = run(replace(config, llama_cpp_bin="llama"), FakeBench(estimate=True))
    document = read_sealed(config.out / "density.json", ResultError, "")
    assert document == plain(sweep)
    assert DENSITY.read(config.out) == sweep
    assert (document["kind"], document["schema_version"]) == ("psp.density", 1)
    assert document["hardware"] == plain(this_machine().facts)
    assert document["threads"] == 1
    sizes = {"d_model": 64, "d_ff": 1024, "n_heads": 4, "n_layers": 2, "rank": 32, "seed": 0}
    assert document["shape"] == sizes
    first, second = document["points"]
    assert first == {
        "density": 51 / 1024,
        "density_wanted": 0.05,
        "predicted": {"tokens_per_second": 200.0, "quartiles": [180.0, 240.0]},
        "all_neurons": {"tokens_per_second": 10.0, "quartiles": [9.0, 12.0]},
        "dense": {"tokens_per_second": 11.0, "quartiles": [0.9 * 11, 1.2 * 11]},
        "dense_llama_cpp": {"tokens_per_second": 12.0, "quartiles": [0.9 * 12, 1.2 * 12]},
        "speedup": {
            "arm": "predicted",
            "over": "all_neurons",
            "ratio": 20.0,
            "quartiles": [10.0, 40.0],
        },
        "estimate": ESTIMATES,
        "ppl_gap": 0.0,
        "greedy_text_same": True,
    }
    assert second["density"] == 0.5
    assert (config.out / "density.png").read_bytes()[:4] == b"\x89PNG"
    assert "<!-- 2 layers of d_model 64," in (config.out / "density.svg").read_text()


def test_a_failure_keeps_what_was_measured_and_the_next_run_goes_on(config: DensityConfig) -> None:
    config = replace(config, densities=(0.5, 0.05, 0.2))
    broken, whole = FakeBench(fails_at=0.05), FakeBench()
    with refused(EngineError, "stopped"):
        run(config, broken)
    kept = json.loads((config.out / "density.json").read_text())
    assert [point["density"] for point in kept["points"]] == [0.5]
    document = run(config, whole)
    assert (broken.asked, whole.asked) == ([0.5], [0.05, 0.2])
    assert [point.density_wanted for point in document.points] == [0.05, 0.2, 0.5]
    assert plain(document.points[2]) == kept["points"][0]
    idle = FakeBench()
    assert run(replace(config, densities=(0.2, 0.2)), idle) == document
    assert not idle.asked


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"threads": 2}, "threads"),
        ({"repeats": 6}, "repeats"),
        ({"generate": 9}, "generate"),
        ({"hardware": "this"}, "hardware"),
        ({"outtype": "q4_0"}, "outtype"),
        ({"shape": replace(TINY, rank=64)}, "shape"),
        ({"powerinfer_bin": Path("other")}, "powerinfer_bin"),
    ],
)
def test_other_settings_do_not_mix(
    swept: DensityConfig, document: dict[str, Any], changes: dict[str, Any], key: str
) -> None:
    bench = FakeBench()
    with refused(OutputError, "density.json", f"another {key};", "another --out"):
        run(replace(swept, **changes), bench)
    assert not bench.asked
    assert document == read_sealed(swept.out / "density.json", ResultError, "")


def test_machines_do_not_mix(
    swept: DensityConfig, document: dict[str, Any], tmp_path: Path
) -> None:
    config = replace(swept, out=tmp_path)
    document["hardware"]["cpus"] += 1
    (config.out / "density.json").write_text(json.dumps(document))
    with refused(OutputError, "density.json", "another hardware;"):
        run(config, FakeBench())


def test_a_foreign_file_is_refused(config: DensityConfig) -> None:
    for content in ("[]", "{", '{"points": []}', '{"settings": 3}', '{"settings": {}}'):
        (config.out / "density.json").write_text(content)
        with refused(ResultError, "density.json", "--out"):
            run(config, FakeBench())


def test_impossible_densities_are_refused_before_anything_runs(config: DensityConfig) -> None:
    with refused(ExportError, "density 1.5 "):
        replace(config, densities=(0.5, 1.5))


@pytest.mark.parametrize(
    ("wanted", "name"), [(0.1, "0.10"), (1.0, "1.00"), (0.75, "0.75"), (0.125, "0.125")]
)
def test_names_of_directories(wanted: float, name: str) -> None:
    assert label(wanted) == name


def test_the_table_has_a_row_for_each_density(document: dict[str, Any]) -> None:
    header, _, first, second = lines(parse(Density, document)).splitlines()
    names = ["density", "predicted", "all", "neurons", "dense", "predicted", "/", "all"]
    assert header.split() == names
    assert first.split() == ["0.0498", "200.00", "10.00", "11.00", "20.00"]
    assert second.split() == ["0.5000", "20.00", "10.00", "11.00", "2.00"]


def test_the_command_reads_densities_and_shows_errors_in_one_line(
    config: DensityConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[DensityConfig] = []

    def fake(asked: DensityConfig) -> Density:
        seen.append(asked)
        return run(asked, FakeBench())

    monkeypatch.setattr(density, "run", fake)
    options = ["--powerinfer-bin", config.powerinfer_bin, "--tokenizer", config.tokenizer]
    options += ["--d-model", 64, "--d-ff", 1024, "--heads", 4, "--layers", 2, "--rank", 32]

    def call(*more: object) -> Any:
        out = ["--out", config.out / "new"]
        return CliRunner().invoke(density.main, [str(each) for each in (*options, *out, *more)])

    assert "0.5000" in call("--densities", "0.05,0.5").stdout
    assert seen[0] == replace(config, out=config.out / "new", densities=(0.05, 0.5))
    wrong = call("--densities", "a,1")
    assert (wrong.exit_code, "'a,1' is no list" in wrong.stderr) == (2, True)
    wrong = call("--densities", "0.1,2")
    assert wrong.exit_code == 1
    assert "Error: density 2 is outside" in wrong.stderr
    wrong = call("--densities", "0.5", "--rank", 33)
    assert wrong.stderr.startswith("Error: rank 33")


def test_the_fixture_goes_whatever_happens(
    config: DensityConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def stopped(settings: Any) -> Any:
        asked.append(settings)
        assert settings.file.stat().st_size > 1_000_000
        assert settings.dense_gguf.exists()
        raise EngineError("stopped; start it again")

    monkeypatch.setattr(density, "bench", stopped)
    leftover = config.out / "fixture-0.05"
    leftover.mkdir()
    (leftover / "density-0.05.powerinfer.gguf").write_bytes(b"of a killed run")
    with refused(EngineError, "stopped"):
        run(replace(config, densities=(0.05,), threads=2, generate=9, repeats=3))
    (settings,) = asked
    assert (settings.threads, settings.generate, settings.repeats) == (2, 9, 3)
    assert settings.out == config.out / "bench-0.05"
    assert not list(config.out.glob("fixture-*"))


def error_bars(axes: Axes) -> list[ErrorbarContainer]:
    return [each for each in axes.containers if isinstance(each, ErrorbarContainer)]


def drawn(document: Density) -> dict[str, Any]:
    """Return the lines' numbers by label."""
    (axes,) = density_figure(document.points, 3.6).axes
    lines = {str(bar.get_label()): bar.lines[0] for bar in error_bars(axes)}
    lines |= {str(line.get_label()): line for line in axes.lines}
    return {
        name: np.array(line.get_xydata())
        for name, line in lines.items()
        if line is not None and name != "_nolegend_"  # of error bars
    }


def legend(document: Density) -> list[str]:
    (key,) = density_figure(document.points, 3.6).legends
    return [text.get_text() for text in key.get_texts()]


def test_the_figure_shows_every_arm_and_its_estimate(config: DensityConfig) -> None:
    document = run(replace(config, llama_cpp_bin="llama"), FakeBench(estimate=True))
    found, at = drawn(document), [100 * 51 / 1024, 50]
    expected: dict[str, tuple[float, float]] = {
        "predicted neurons": (200, 20),
        "all neurons": (10, 10),
        "dense": (11, 11),
        "dense, llama.cpp": (12, 12),
    }
    expected |= {f"_estimate: {arm}": (value, value) for arm, value in ESTIMATES.items()}
    assert set(found) == set(expected)
    for name, speeds in expected.items():
        np.testing.assert_allclose(found[name], list(zip(at, speeds, strict=True)))
    assert legend(document) == [*list(expected)[:4], "estimate of each"]


def test_the_figure_shows_spread_and_tells_lines_apart_without_colour(
    document: dict[str, Any],
) -> None:
    (axes,) = density_figure(parse(Density, document).points, 3.6).axes
    looks = set()
    for bar in error_bars(axes):
        line, _, (spread,) = bar.lines
        assert line is not None
        looks.add((line.get_marker(), line.get_linestyle()))
        medians = np.array(line.get_xydata())
        segments = np.array(spread.get_segments())  # (points, end, xy)
        np.testing.assert_allclose(segments[:, 0, 1], 0.9 * medians[:, 1])
        np.testing.assert_allclose(segments[:, 1, 1], 1.2 * medians[:, 1])
    assert len(looks) == len(axes.containers) == 3
    assert axes.get_ylim()[0] == 0
    assert not axes.get_title(loc="left")  # its text would be the document's


def test_the_figure_does_without_dense_and_estimate(document: dict[str, Any]) -> None:
    found = parse(Density, document)
    found = replace(found, points=tuple(replace(point, dense=None) for point in found.points))
    assert legend(found) == ["predicted neurons", "all neurons"]
    assert set(drawn(found)) == {"predicted neurons", "all neurons"}
