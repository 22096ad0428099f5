"""Which device holds what, and how much of the work falls on the GPU."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import make_export, refused

from common.errors import PredictorError
from common.machine import Gpu
from common.units import MIB
from gguf_export.bundle import Bundle
from gguf_export.gpu_split import split
from gguf_export.pwri.gpu_index import index_path
from gguf_export.pwri.hyperparameters import Hyperparameters, read_hyperparameters
from gguf_export.pwri.memory_plan import BUCKET_BYTES
from gguf_export.settings import SplitConfig
from gguf_files.reader import GGUFFile
from powerinfer_bridge.benchmark.placement import (
    PLACED_PARTS,
    NeuronFacts,
    frequency_curve,
    place,
    place_layer,
    read_neuron_facts,
    vram_budget,
)
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.programs.sample import ProgramFacts
from results.parts import METRICS, Layer

ROOM = 64


@pytest.fixture
def file(exact_bundle: Bundle, tmp_path: Path) -> Path:
    """The exported file with its statistics, in a place of its own."""
    shutil.copytree(exact_bundle.activation_directory, tmp_path / "activation")
    return Path(shutil.copy(exact_bundle.model_file, tmp_path))


@dataclass(frozen=True)
class Opened:
    """A file, its sizes, and what lies beside it."""

    file: GGUFFile
    hyper: Hyperparameters
    neurons: NeuronFacts


def open_file(path: Path) -> Opened:
    file = GGUFFile(path)
    hyper = read_hyperparameters(file)
    return Opened(file, hyper, read_neuron_facts(file, hyper))


@pytest.fixture
def opened(file: Path) -> Opened:
    return open_file(file)


def test_statistics_of_another_model_are_no_file_s_without_predictors(
    file: Path, model_dir: Path
) -> None:
    none = make_export(model_dir, Path("none"), file.with_name("none.powerinfer.gguf")).model_file
    (file.parent / "activation" / "activation_1.pt").unlink()  # as of another number of layers
    assert open_file(none).neurons.counts is None


def layer(number: int) -> Layer:
    shares = dict.fromkeys(METRICS, 0.5)
    return Layer(layer=number, rank=7, **shares)


def sums(
    opened: Opened, budget: int | None, neurons: NeuronFacts | None = None
) -> dict[str, dict[str, int]]:
    placed = place(opened.file, opened.hyper, neurons or opened.neurons, budget, ROOM)
    assert placed.budget_bytes == budget
    return {device.name: device.bytes for device in placed.devices}


def test_without_a_gpu_all_is_on_the_cpu(opened: Opened) -> None:
    found = sums(opened, None)
    assert set(found) == {"CPU"}
    assert set(found["CPU"]) == set(PLACED_PARTS)
    tensors = sum(info.size for info in opened.file.tensors.values())
    hyper = opened.hyper
    cache = 2 * 2 * hyper.n_layers * ROOM * hyper.n_kv_heads * hyper.head_dim
    assert found["CPU"]["kv_cache"] == cache
    assert sum(found["CPU"].values()) == tensors + cache
    assert found["CPU"]["predictors"] == hyper.n_layers * 2 * 128 * (hyper.d_model + hyper.d_ff)
    assert found["CPU"]["ffn_neurons"] == hyper.n_layers * 2 * 3 * hyper.d_model * hyper.d_ff


def test_with_room_for_all_only_the_embedding_stays_on_the_cpu(opened: Opened) -> None:
    found = sums(opened, 1 << 30)
    assert {kind for kind, size in found["CPU"].items() if size} == {"embedding"}
    alone = sums(opened, None, NeuronFacts())["CPU"]
    neurons = opened.hyper.n_layers * opened.hyper.d_ff
    for kind in set(PLACED_PARTS) - {"embedding", "ffn_neurons"}:
        assert found["GPU"][kind] == alone[kind]
    assert found["GPU"]["ffn_neurons"] == alone["ffn_neurons"] + BUCKET_BYTES * neurons


def test_the_index_says_which_neurons_are_on_the_gpu(file: Path) -> None:
    all_of_it = sums(open_file(file), 1 << 30)["GPU"]
    budget = sum(all_of_it.values()) - all_of_it["ffn_neurons"] // 2
    made = split(SplitConfig(file=file, vram_budget=str(budget), context=ROOM))
    opened = open_file(file)
    found = sums(opened, budget)
    moved = found["GPU"]["ffn_neurons"]
    assert all_of_it["ffn_neurons"] > moved == made.ffn_bytes_in_vram > 0
    shares = [place_layer(layer(n), opened.neurons).neuron_share_on_gpu for n in range(2)]
    assert tuple(shares) == made.layers
    curve = frequency_curve(opened.neurons)
    assert curve is not None
    assert curve.gpu_activation_share == pytest.approx(made.activation_share_on_gpu)
    assert curve.gpu_neuron_share == pytest.approx(made.neuron_share_on_gpu)
    # More than is left: PowerInfer refuses the index and lets its solver fill what there is.
    less = budget - moved // 2
    assert 0 < sums(opened, less)["GPU"]["ffn_neurons"] < moved
    assert sums(opened, less, replace(opened.neurons, counts=None))["GPU"]["ffn_neurons"] == 0


def test_an_index_that_is_damaged_is_told_not_used(file: Path) -> None:
    index_path(file).write_bytes(b"nonsense")
    neurons = open_file(file).neurons
    assert neurons.chosen is None
    assert neurons.problem is not None
    assert ".gpuidx" in neurons.problem
    assert neurons.counts is not None


def test_statistics_that_are_damaged_are_refused(file: Path) -> None:
    (file.parent / "activation" / "activation_1.pt").unlink()
    with refused(PredictorError, "activation"):
        open_file(file)


def test_without_statistics_nothing_is_said_of_hot_neurons(file: Path) -> None:
    shutil.rmtree(file.parent / "activation")
    neurons = open_file(file).neurons
    assert frequency_curve(neurons) is None
    placed = place_layer(layer(0), neurons)
    assert (placed.neuron_share_on_gpu, placed.activation_share_on_gpu) == (None, None)
    assert placed.rank == 7


def test_the_curve_adds_up_the_most_active_neurons_of_all_layers() -> None:
    counts = [torch.tensor([70] + [0] * 99), torch.tensor([20, 10] + [0] * 98)]
    mask = torch.zeros(100, dtype=torch.bool)
    chosen = [mask.index_fill(0, torch.tensor([0]), True), mask]
    curve = frequency_curve(NeuronFacts(counts=counts, chosen=chosen))
    assert curve is not None
    assert curve.activation_share[:3] == pytest.approx((0.0, 0.9, 1.0))
    assert curve.activation_share[-1] == pytest.approx(1.0)
    assert len(curve.activation_share) == len(curve.neuron_share) == 101
    assert curve.gpu_activation_share == pytest.approx(0.7)
    assert curve.gpu_neuron_share == pytest.approx(1 / 200)
    silent = frequency_curve(NeuronFacts(counts=[torch.zeros(10, dtype=torch.int64)]))
    assert silent is not None
    assert set(silent.activation_share) == {0.0}


CARD = Gpu(name="card", memory=1000 * MIB, free=900 * MIB)


@pytest.mark.parametrize(
    ("cuda", "asked", "gpus", "expected"),
    [
        (False, "100MiB", (CARD,), None),
        (True, "100MiB", (CARD,), 100 * MIB),
        (None, "100MiB", (), 100 * MIB),
        (True, None, (CARD,), (900 - 256) * MIB),
        (True, None, (), None),
        (None, None, (CARD,), None),
    ],
)
def test_vram_is_what_powerinfer_takes(
    cuda: bool | None, asked: str | None, gpus: tuple[Gpu, ...], expected: int | None
) -> None:
    facts = ProgramFacts(path=Path("main"), kind="powerinfer", version=None, cuda=cuda)
    config = BenchConfig(file=Path("m"), powerinfer_bin=Path("bin"), vram_budget=asked)
    assert vram_budget(config, facts, gpus) == expected
    assert vram_budget(config, None, (CARD,)) is None
