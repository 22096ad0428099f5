"""`psp estimate`: the document, its sources, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up_results
import pytest
from click.testing import Result
from conftest import refused
from made_up_results import Document

from common.errors import EngineError, OutputError, PspError, ResultError
from common.sealed import read_sealed
from common.typed_json import parse, plain
from cost_model.model_bytes import LayerPlace, Place, on_cpu
from cost_model.roofline import PARTS
from gguf_export.bundle import Bundle
from gguf_files.reader import GGUFFile
from powerinfer_bridge.estimate.file import EstimatedFile
from powerinfer_bridge.estimate.run import estimate
from powerinfer_bridge.estimate.settings import EstimateConfig
from powerinfer_bridge.estimate.table import estimate_table
from results.bench import Bench
from results.estimate import Estimate

HARDWARE = """
thread_microseconds: 0
cpu:
  bandwidth_gb_per_s: 10
  memory_gib: 2
  efficiency: {matrix: 1, rows: 1, columns: 1}
  layer_microseconds: 0
"""
GPU = """
gpu:
  bandwidth_gb_per_s: 100
  memory_gib: 1
  efficiency: {matrix: 1, rows: 1, columns: 1}
  layer_microseconds: 0
link: {bandwidth_gb_per_s: 1000, efficiency: 1, copy_microseconds: 0}
"""


@pytest.fixture
def cpu(tmp_path: Path) -> str:
    path = tmp_path / "cpu.yaml"
    path.write_text(HARDWARE)
    return str(path)


@pytest.fixture
def gpu(tmp_path: Path) -> str:
    path = tmp_path / "gpu.yaml"
    path.write_text(HARDWARE + GPU)
    return str(path)


MEASURED = Path("bench.json")
"""What results that were never written are called."""


def estimated(config: EstimateConfig, measured: Bench | None = None) -> Document:
    found: Document = plain(estimate(config, measured))
    return found


def sizes(bundle: Bundle, *stems: str) -> int:
    tensors = GGUFFile(bundle.model_file).tensors
    return sum(tensors[name].size for name in tensors if name.split(".")[-2] in stems)


def bench(**changes: Any) -> Document:
    """Return a benchmark of two layers, the second changed."""
    made = made_up_results.bench(n_layers=2)
    shares = {"predicted_sparsity": 0.8, "precision": 0.5, "activation_sparsity": 0.85}
    first, second = ({**layer, **shares} for layer in made["layers"])
    return made | {"layers": [first, second | changes]}


def measured(**changes: Any) -> Bench:
    return parse(Bench, bench(**changes))


def test_the_bytes_are_the_files(exact_bundle: Bundle) -> None:
    model = EstimatedFile(exact_bundle.model_file).bytes
    attention = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_norm", "ffn_norm")
    assert sum(layer.attention for layer in model.layers) == sizes(exact_bundle, *attention)
    assert sum(layer.predictor for layer in model.layers) == sizes(exact_bundle, "fc1", "fc2")
    ffn = sizes(exact_bundle, "ffn_gate", "ffn_up", "ffn_down_t")
    assert sum(layer.ffn for layer in model.layers) == ffn
    assert model.head == sizes(exact_bundle, "output", "output_norm")
    # Two key/value heads of 16, keys and values, F16.
    assert model.kv_token == 2 * 2 * 2 * 16
    assert model.layers[0].neuron_rows == 2 * 64 * 2
    assert model.layers[0].neuron_column == 64 * 2


def test_seconds_on_a_cpu_by_hand(exact_bundle: Bundle, cpu: str) -> None:
    document = estimated(
        EstimateConfig(
            file=exact_bundle.model_file,
            hardware=cpu,
            density=0.3,
            precision=0.5,
            active=0.2,
            context=100,
            position=10,
        )
    )
    model = EstimatedFile(exact_bundle.model_file).bytes
    always = sum(layer.attention for layer in model.layers) + model.head + 2 * 10 * model.kv_token
    predictor, ffn = (
        sum(getattr(each, kind) for each in model.layers) for kind in ("predictor", "ffn")
    )
    bytes_read = {
        "dense": always + ffn,
        "all_neurons": always + predictor + ffn * (2 + 0.2) / 3,
        "predicted": always + predictor + ffn * (2 * 0.3 + 0.15) / 3,
    }
    expected = {arm: 10e9 / read for arm, read in bytes_read.items()}
    assert document["tokens_per_second"] == pytest.approx(expected)
    assert document["device_bytes"]["predicted"]["CPU"] == pytest.approx(bytes_read["predicted"])
    ratio = bytes_read["dense"] / bytes_read["predicted"]
    assert document["speedups"]["predicted_over_dense"] == pytest.approx(ratio)
    assert document["vram_budgets"] == []
    assert document["dense"] == {
        "bytes": always - 2 * 10 * model.kv_token + ffn,
        "kv_cache_bytes": 2 * 100 * model.kv_token,
        "fits_on_gpu": False,
        "n_gpu_layers": None,
    }


def test_the_document_is_labelled_and_adds_up(exact_bundle: Bundle, gpu: str) -> None:
    config = EstimateConfig(file=exact_bundle.model_file, hardware=gpu, bench=MEASURED)
    document = estimated(config, measured())
    assert json.loads(json.dumps(document)) == document
    assert (document["kind"], document["schema_version"]) == ("psp.estimate", 1)
    assert document["label"] == "estimate"
    assert document["hardware"] == "gpu"
    assert (document["context"], document["position"]) == (512, 256)
    for arm, speed in document["tokens_per_second"].items():
        seconds = dict(document["seconds"][arm])
        total = seconds.pop("total")
        assert set(seconds) == set(PARTS)
        assert total == pytest.approx(sum(seconds.values()))
        assert total == pytest.approx(1 / speed)
        busy = sum(document["device_seconds"][arm].values())
        assert total == pytest.approx(busy + seconds["overlap"])
    headings = estimate_table(parse(Estimate, document)).split("\n\n")
    assert all("estimate" in part.splitlines()[0].lower() for part in headings)


def test_what_lies_in_vram_is_powerinfers_plan(exact_bundle: Bundle) -> None:
    file = EstimatedFile(exact_bundle.model_file)
    cache = file.kv_cache(512)
    ffn = sum(layer.ffn for layer in file.bytes.layers) + 2 * 1012 * 4  # and entries in the bucket
    assert file.everything == file.but_neurons + ffn
    everything = file.place(file.everything + cache, 512).place
    assert (everything.head, everything.kv) == (True, 1.0)
    whole = LayerPlace(attention=1.0, fc1=True, fc2=True, neurons=1.0, activations=1.0)
    assert everything.layers == (whole, whole)
    cold = replace(whole, neurons=0.0, activations=0.0)
    placed = file.place(file.but_neurons + cache // 2, 512).place
    assert placed == Place(layers=(cold, cold), head=True, kv=0.5)
    attention = file.place(sizes(exact_bundle, "attn_q", "attn_k"), 512).place
    assert 0 < attention.layers[0].attention <= 1
    assert not attention.layers[0].fc1
    assert not attention.head
    assert file.place(0, 512).place == on_cpu(2)


def test_budgets_go_from_nothing_to_everything(exact_bundle: Bundle, gpu: str) -> None:
    config = EstimateConfig(
        file=exact_bundle.model_file, hardware=gpu, bench=MEASURED, vram_budget="200KB"
    )
    document = estimated(config, measured())
    rows = document["vram_budgets"]
    assert len(rows) >= 10
    assert [row["bytes"] for row in rows] == sorted(row["bytes"] for row in rows)
    assert rows[0]["bytes"] == 0
    assert rows[0]["neuron_share_on_gpu"] == 0
    assert rows[-1]["neuron_share_on_gpu"] == 1
    assert rows[-1]["kv_cache_in_vram"]
    assert 200_000 in [pytest.approx(row["bytes"], abs=1) for row in rows]
    best = [row for row in rows if row["best"]]
    assert best == [document["best_vram_budget"]]
    fastest = max(row["tokens_per_second"] for row in rows)
    assert best[0]["tokens_per_second"] >= 0.99 * fastest
    smaller = [row for row in rows if row["bytes"] < best[0]["bytes"]]
    assert all(row["tokens_per_second"] < 0.99 * fastest for row in smaller)
    # A dense engine has more of its layers there.
    dense = [row["dense_tokens_per_second"] for row in rows]
    assert dense == sorted(dense)
    assert dense[0] < dense[-1]
    # The budget asked for is what the three speeds are for.
    asked = next(row for row in rows if row["bytes"] == pytest.approx(200_000, abs=1))
    speeds = document["tokens_per_second"]
    assert asked["tokens_per_second"] == pytest.approx(speeds["predicted"])
    assert asked["dense_tokens_per_second"] == pytest.approx(speeds["dense"])
    assert document["dense"]["n_gpu_layers"] < 2


def test_budgets_with_which_a_dense_engine_is_faster_are_named(
    exact_bundle: Bundle, gpu: str
) -> None:
    text = Path(gpu).read_text().replace("layer_microseconds: 0", "layer_microseconds: 900")
    slow, file = Path(gpu).with_name("slow.yaml"), exact_bundle.model_file
    slow.write_text(text.replace("900\nlink", "900\n  dense_layer_microseconds: 1\nlink"))
    config = EstimateConfig(file=file, hardware=str(slow), bench=MEASURED)
    document = estimated(config, measured())
    rows = document["vram_budgets"]
    lost = [row["dense_tokens_per_second"] > row["tokens_per_second"] for row in rows]
    assert lost[-1]
    assert not all(lost)
    shown = estimate_table(parse(Estimate, document))
    line = next(each for each in shown.splitlines() if "in llama.cpp is faster with" in each)
    assert line.count("iB") == sum(lost)
    config = EstimateConfig(file=file, hardware=gpu, bench=MEASURED)
    found = estimate(config, measured())
    silent = [replace(each, dense_tokens_per_second=None) for each in found.vram_budgets]
    old = replace(found, vram_budgets=tuple(silent))
    assert "in llama.cpp is faster with" not in estimate_table(old)


def test_the_threads_that_are_started_are_told(exact_bundle: Bundle, cpu: str) -> None:
    config: dict[str, Any] = {"file": exact_bundle.model_file, "density": 0.1}
    threads = Path(cpu).with_name("threads.yaml")
    threads.write_text(HARDWARE.replace("thread_microseconds: 0", "thread_microseconds: 100000"))
    slow, quick = (
        estimate(EstimateConfig(**config, hardware=str(each))) for each in (threads, cpu)
    )
    told = "PowerInfer starts 7 threads for every token"
    assert told in slow.assumptions
    assert told not in quick.assumptions
    for arm, seconds in (("predicted", 0.7), ("all_neurons", 0.7), ("dense", 0.0)):
        more = slow.seconds[arm]["total"] - quick.seconds[arm]["total"]
        assert more == pytest.approx(seconds, abs=1e-9)


def test_without_a_budget_the_card_is_the_budget(exact_bundle: Bundle, gpu: str) -> None:
    document = estimated(
        EstimateConfig(file=exact_bundle.model_file, hardware=gpu, bench=MEASURED), measured()
    )
    assert document["vram_budget_bytes"] == (1 << 30) - (256 << 20)
    assert document["dense"]["fits_on_gpu"]
    assert document["dense"]["n_gpu_layers"] == 3
    assert document["placement"]["everything_but_ffn_fits"]
    assert document["seconds"]["predicted"]["ffn_cold"] == 0
    # All is in the GPU's memory: the activations do not leave it.
    assert document["seconds"]["predicted"]["overlap"] == 0


def test_a_benchmark_tells_several_at_once(exact_bundle: Bundle, cpu: str, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(bench(predicted_sparsity=0.6)))
    config = EstimateConfig(file=exact_bundle.model_file, hardware=cpu, bench=tmp_path)
    activity = estimated(config)["activity"]
    assert activity["predicted"] == pytest.approx(0.3)
    assert activity["predicted_and_active"] == pytest.approx(0.15)
    assert activity["layers"][1] == pytest.approx({"predicted": 0.4, "both": 0.2, "active": 0.2})
    assert activity["source"] == str(tmp_path / "bench.json")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"precision": 1.5}, "'layers[1].precision': expected a number from 0 to 1, found 1.5"),
        ({"precision": None}, "'layers[1].precision': expected a number, found None"),
        ({"predicted_sparsity": float("nan")}, "'layers[1].predicted_sparsity': expected a finite"),
        ({"activation_sparsity": True}, "'layers[1].activation_sparsity': expected a number, foun"),
        ({"activation_sparsity": 10**400}, "'layers[1].activation_sparsity': expected a finite"),
    ],
)
def test_hostile_benchmarks_are_refused(
    changes: dict[str, Any], problem: str, exact_bundle: Bundle, cpu: str, tmp_path: Path
) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(bench(**changes)))
    config = EstimateConfig(file=exact_bundle.model_file, hardware=cpu, bench=tmp_path)
    with refused(ResultError, f"{tmp_path}/bench.json: {problem}", "pass a bench.json of psp"):
        estimate(config)


def test_shares_that_rounding_left_beside_1_are_taken(exact_bundle: Bundle, cpu: str) -> None:
    shares = {"predicted_sparsity": 1e-9, "precision": 1 + 1e-9, "activation_sparsity": 1 + 1e-9}
    config = EstimateConfig(file=exact_bundle.model_file, hardware=cpu, bench=MEASURED)
    assert estimate(config, measured(**shares)).activity.layers[1].both <= 1
    none = measured(predicted_sparsity=1 + 1e-9)
    assert estimate(config, none).activity.layers[1].predicted == 0


def test_a_benchmark_of_another_model_is_refused(
    exact_bundle: Bundle, cpu: str, tmp_path: Path
) -> None:
    config: dict[str, Any] = {"file": exact_bundle.model_file, "hardware": cpu}
    other = parse(Bench, made_up_results.bench(n_layers=1))
    with refused(EngineError, "bench.json: 1 layers, the model has 2"):
        estimate(EstimateConfig(**config, bench=MEASURED), other)
    (tmp_path / "bench.json").write_text("{}")
    with refused(ResultError, "bench.json: no 'kind'", "or --density"):
        estimate(EstimateConfig(**config, bench=tmp_path))


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, ["pass either --density, or --bench"]),
        ({"density": 0.1, "bench": Path("x")}, ["pass either --density, or --bench"]),
        ({"bench": Path("x"), "active": 0.1}, ["--precision and --active go with --density"]),
        ({"density": 1.5}, ["--density is 1.5"]),
        ({"density": float("nan")}, ["--density is nan"]),
        ({"density": 0.5, "position": 600}, ["--position 600 is outside the context 512"]),
        ({"density": 0.5, "context": 0}, ["at least 1"]),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], parts: list[str]) -> None:
    with refused(PspError, *parts):
        EstimateConfig(file=Path("m.gguf"), hardware="this", **settings)


def test_what_the_hardware_cannot_do_is_refused(exact_bundle: Bundle, cpu: str) -> None:
    config: dict[str, Any] = {"file": exact_bundle.model_file, "hardware": cpu, "density": 0.1}
    with refused(EngineError, "--vram-budget: hardware cpu has no GPU"):
        estimate(EstimateConfig(**config, vram_budget="1GiB"))
    with refused(EngineError, "--active 0.05 is less than density · precision = 0.1"):
        estimate(EstimateConfig(**config, active=0.05))


def test_no_budget_is_more_than_the_card(exact_bundle: Bundle, gpu: str) -> None:
    config: dict[str, Any] = {"file": exact_bundle.model_file, "hardware": gpu, "density": 0.1}
    with refused(EngineError, "--vram-budget 2GiB is more than the 1073741824 bytes of gpu"):
        estimate(EstimateConfig(**config, vram_budget="2GiB"))
    document = estimated(EstimateConfig(**config, vram_budget="900MiB"))
    assert [row["fits_on_card"] for row in document["vram_budgets"]][-2:] == [True, False]
    assert not document["vram_budgets"][-1]["best"]
    assert "! leaves less than the 256 MiB" in estimate_table(parse(Estimate, document))


def test_outputs_are_kept(exact_bundle: Bundle, cpu: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "file": exact_bundle.model_file,
        "hardware": cpu,
        "density": 0.1,
        "out": tmp_path / "o",
    }
    document = estimated(EstimateConfig(**config))
    assert read_sealed(tmp_path / "o" / "estimate.json", ResultError, "") == document
    with refused(OutputError, "estimate.json exists", "--force"):
        estimate(EstimateConfig(**config))
    estimate(EstimateConfig(**config, force=True))


def test_the_command(exact_bundle: Bundle, gpu: str, psp: Callable[..., Result]) -> None:
    arguments = ("estimate", exact_bundle.model_file, "--hardware", gpu)
    done = psp(*arguments, "--density", "10%", "--precision", "0.5", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["activity"]["predicted"] == pytest.approx(0.1)
    assert document["activity"]["predicted_and_active"] == pytest.approx(0.05)
    text = psp(*arguments, "--density", "0.1").stdout
    assert text.startswith("ESTIMATE ")
    assert "assumed: every predicted neuron is active" in text
    best = document["best_vram_budget"]["powerinfer_option"]
    assert f"* smallest within 1 % of the fastest: {best}" in text
    nothing = psp(*arguments)
    assert nothing.exit_code == 1
    assert "pass either --density, or --bench" in nothing.stderr
    unknown = psp("estimate", exact_bundle.model_file, "--hardware", "x", "--density", "1")
    assert unknown.exit_code == 1
    assert "hardware 'x': expected FILE.yaml or one of this" in unknown.stderr
