"""Measured runs as `psp estimate --calibrate` reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up_density
import made_up_results
import pytest
from click.testing import Result
from conftest import refused
from made_up_results import Document

from common.errors import EngineError, PspError
from cost_model.hardware import Device, Efficiency, Hardware, load_hardware, save_hardware
from cost_model.model_bytes import Activity, on_cpu
from cost_model.roofline import dense_token, sparse_token
from gguf_export.bundle import Bundle
from powerinfer_bridge.estimate.calibration import calibrate_hardware
from powerinfer_bridge.estimate.file import EstimatedFile
from powerinfer_bridge.estimate.run import estimate
from powerinfer_bridge.estimate.settings import EstimateConfig

STREAMED = Hardware(
    name="streamed",
    cpu=Device(
        name="made up",
        bandwidth=10e9,
        memory=1 << 34,
        efficiency=Efficiency(matrix=1.0, rows=1.0, columns=1.0),
        layer_seconds=1e-6,
    ),
)
TRUE = replace(
    STREAMED,
    cpu=replace(
        STREAMED.cpu, efficiency=Efficiency(matrix=0.5, rows=0.3, columns=0.2), layer_seconds=2e-6
    ),
)
DENSITIES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture
def file(exact_bundle: Bundle) -> EstimatedFile:
    return EstimatedFile(exact_bundle.model_file)


def speeds(file: EstimatedFile, activity: Activity, position: float) -> dict[str, float]:
    """What PowerInfer would do if the model were right."""
    place, layers = on_cpu(2), [activity] * 2
    full = [activity.all_neurons] * 2
    return {
        "predicted": sparse_token(file.bytes, place, TRUE, layers, position).tokens_per_second,
        "all_neurons": sparse_token(file.bytes, place, TRUE, full, position).tokens_per_second,
        "dense": dense_token(file.bytes, 0, TRUE, position).tokens_per_second,
    }


def sweep(file: EstimatedFile, **changes: Any) -> Document:
    made = made_up_density.density()
    points = []
    for density in DENSITIES:
        both = min(density, 0.5)
        found = speeds(file, Activity(predicted=density, both=both, active=both), 8)
        points.append(
            made["points"][0] | {"density": density} | {a: rate(s) for a, s in found.items()}
        )
    shape = made["shape"] | {"d_model": 64, "d_ff": 1012, "n_layers": 2, "rank": 128}
    changed = {"shape": shape, "threads": 1, "settings": {"generate": 16}, "points": points}
    return made | changed | changes


def rate(speed: float) -> Document:
    return {"tokens_per_second": speed, "quartiles": [speed, speed]}


def bench(measured: EstimatedFile, density: float, tokens: int = 40, **changes: Any) -> Document:
    made = made_up_results.bench(n_layers=2)
    activity = Activity(predicted=density, both=0.8 * density, active=0.9 * density)
    found = speeds(measured, activity, 4 + tokens / 2)
    shares = {
        "predicted_sparsity": 1 - density,
        "precision": 0.8,
        "activation_sparsity": 1 - 0.9 * density,
    }
    names = {"predicted": "predicted", "all_neurons": "all_neurons", "dense": "dense_powerinfer"}
    arms = [
        made["arms"][0]
        | {"name": names[arm], "threads": 1, "device": {"cuda": False}}
        | {"decode": rate(speed) | {"range": [speed, speed], "rounds": 5}}
        for arm, speed in found.items()
    ]
    sample = made["samples"][0] | {"prompt_tokens": 4, "decode_tokens": tokens}
    changed = {
        "file": str(measured.path),
        "layers": [layer | shares for layer in made["layers"]],
        "arms": arms,
        "samples": [sample | {"arm": arm["name"]} for arm in arms],
    }
    return made | changed | changes


def write(directory: Path, name: str, document: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(json.dumps(document))
    return directory


def benches(directory: Path, measured: EstimatedFile, **changes: Any) -> list[Path]:
    return [
        write(directory / f"{density}", "bench.json", bench(measured, density, **changes))
        for density in (0.1, 0.4, 0.9)
    ]


def test_a_sweep_gives_back_what_made_it(file: EstimatedFile, tmp_path: Path) -> None:
    sources = [write(tmp_path, "density.json", sweep(file))]
    fitted, facts = calibrate_hardware(STREAMED, sources, file)
    assert len(facts.runs) == 3 * len(DENSITIES)
    assert facts.largest_error < 0.02
    assert facts.largest_ratio_error is not None
    assert facts.largest_ratio_error < 0.02
    assert facts.left_out
    assert fitted.cpu.efficiency.rows == pytest.approx(0.3, rel=0.05)
    assert fitted.threads == 1


def test_benchmarks_give_back_what_made_them(file: EstimatedFile, tmp_path: Path) -> None:
    fitted, facts = calibrate_hardware(STREAMED, benches(tmp_path, file), file)
    assert len(facts.runs) == 9
    assert facts.largest_error < 0.02
    assert fitted.cpu.efficiency.rows == pytest.approx(0.3, rel=0.05)
    assert fitted.cpu.efficiency.columns == pytest.approx(0.2, rel=0.05)


def test_one_benchmark_cannot_be_left_out(file: EstimatedFile, tmp_path: Path) -> None:
    source = write(tmp_path, "bench.json", bench(file, 0.5))
    _, facts = calibrate_hardware(STREAMED, [source], file)
    assert not facts.left_out


def test_the_cache_is_read_as_far_as_it_was_filled(file: EstimatedFile, tmp_path: Path) -> None:
    """With so many tokens it is most of what is read, and mistaken would spoil the bandwidth."""
    fitted, _ = calibrate_hardware(STREAMED, benches(tmp_path, file, tokens=40_000), file)
    assert fitted.cpu.efficiency.matrix == pytest.approx(0.5, rel=0.05)


def test_runs_on_a_gpu_are_left_out(file: EstimatedFile, tmp_path: Path) -> None:
    document = bench(file, 0.5)
    document["arms"][0]["vram_budget_bytes"] = 1 << 30
    document["arms"][1]["n_gpu_layers"] = 3
    document["arms"][2]["device"] = {"cuda": True}
    source = write(tmp_path, "bench.json", document)
    with refused(EngineError, "no run of PowerInfer on the CPU alone, 3 with a GPU"):
        calibrate_hardware(STREAMED, [source], file)
    _, facts = calibrate_hardware(STREAMED, [source, *benches(tmp_path / "cpu", file)], file)
    assert (len(facts.runs), facts.passed_over) == (9, 3)


def test_a_file_that_is_gone_is_stood_for_by_its_like(file: EstimatedFile, tmp_path: Path) -> None:
    ffn = sum(layer.ffn for layer in file.bytes.layers)

    def sources(name: str, size: int) -> list[Path]:
        device = {"name": "CPU", "bytes": {"ffn_neurons": size}}
        placement = {"budget_bytes": None, "devices": [device]}
        changes = {"file": "/nowhere/gone.powerinfer.gguf", "placement": placement}
        return benches(tmp_path / name, file, **changes)

    _, facts = calibrate_hardware(STREAMED, sources("like", ffn), file)
    assert facts.largest_error < 0.02
    with refused(EngineError, "gone.powerinfer.gguf' is gone and has not the shape of"):
        calibrate_hardware(STREAMED, sources("unlike", ffn + 1), file)


@pytest.mark.parametrize(
    ("name", "changes", "parts"),
    [
        ("density.json", {"shape": {"d_model": 64}}, ["no 'shape.d_ff'"]),
        (
            "density.json",
            {"shape": made_up_density.density()["shape"]},
            ["d_model is 4096"],
        ),
        ("density.json", {"shape": None}, ["'shape': expected an object, found None"]),
        (
            "density.json",
            {"points": [{"density": 3}]},
            ["'points[0].density': expected a number"],
        ),
        ("density.json", {"points": []}, ["'points': expected at least one point"]),
        ("density.json", {"points": None}, ["'points': expected an array, found None"]),
        ("density.json", {"kind": "psp.report"}, ["kind is 'psp.report'"]),
        ("bench.json", {"engine": "embedded engine"}, ["engine is 'embedded engine'"]),
        ("bench.json", {"layers": []}, ["0 layers, the model has 2"]),
        ("bench.json", {"arms": [1, {"name": []}]}, ["'arms[0]': expected an object, found 1"]),
        ("bench.json", {"arms": None}, ["'arms': expected an array, found None"]),
    ],
)
def test_hostile_results_are_refused(
    name: str, changes: dict[str, Any], parts: list[str], file: EstimatedFile, tmp_path: Path
) -> None:
    document = (sweep(file) if name == "density.json" else bench(file, 0.5)) | changes
    with refused(PspError, *parts):
        calibrate_hardware(STREAMED, [write(tmp_path, name, document)], file)


def test_a_directory_without_results_is_refused(file: EstimatedFile, tmp_path: Path) -> None:
    with refused(EngineError, str(tmp_path), "holds neither bench.json nor density.json"):
        calibrate_hardware(STREAMED, [tmp_path], file)


def test_one_calibration_is_for_one_number_of_threads(file: EstimatedFile, tmp_path: Path) -> None:
    sources = [
        write(tmp_path / "one", "density.json", sweep(file)),
        write(tmp_path / "two", "density.json", sweep(file, threads=2)),
    ]
    with refused(EngineError, "runs with 1, 2 threads", "one calibration is for one --threads"):
        calibrate_hardware(STREAMED, sources, file)
    with refused(EngineError, "runs with 1 threads, hardware streamed with 4"):
        calibrate_hardware(replace(STREAMED, threads=4), sources[:1], file)


def test_the_command_fits_and_saves(
    file: EstimatedFile, tmp_path: Path, psp: Callable[..., Result]
) -> None:
    save_hardware(tmp_path / "streamed.yaml", STREAMED)
    source = write(tmp_path, "density.json", sweep(file))
    saved = tmp_path / "fitted.yaml"
    options = ("--density", "0.3", "--active", "0.3", "--ctx", "16")
    done = psp(
        *("estimate", file.path, "--hardware", tmp_path / "streamed.yaml", *options),
        *("--calibrate", source, "--save-hardware", saved),
    )
    assert done.exit_code == 0, done.output
    assert "calibration, left out in turn" in done.stdout
    assert "largest error of an estimate: " in done.stdout
    assert "largest error of predicted over all neurons: " in done.stdout
    config = EstimateConfig(
        file=file.path, hardware=str(saved), density=0.3, active=0.3, context=16
    )
    found = estimate(config).tokens_per_second
    expected = speeds(file, Activity(predicted=0.3, both=0.3, active=0.3), 8)
    assert found == pytest.approx(expected, rel=0.02)
    assert load_hardware(str(saved)).threads == 1
    again = psp(*("estimate", file.path, "--hardware", saved, *options, "--save-hardware", saved))
    assert again.exit_code == 1
    assert "exists; pass --force" in again.stderr
