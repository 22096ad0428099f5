"""Which device holds what, and how much of the work falls on the GPU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import refused

from common.errors import PredictorError
from gguf_export.bundle import Bundle
from gguf_export.pwri.gpu_index import index_path
from gguf_export.pwri.memory_plan import BUCKET_BYTES
from gguf_export.settings import SplitConfig
from gguf_export.split_file import split
from powerinfer_bridge.benchmark.machine import Gpu, Machine
from powerinfer_bridge.benchmark.placement import (
    PLACED_KINDS,
    HotNeurons,
    frequency_curve,
    layer_shares,
    place,
    read_hot_neurons,
    vram_budget,
)
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.benchmark.subject import Subject, open_subject
from powerinfer_bridge.programs.sample import ProgramFacts

ROOM = 64


@pytest.fixture
def file(exact_bundle: Bundle, tmp_path: Path) -> Path:
    """The exported file with its statistics, in a place of its own."""
    shutil.copytree(exact_bundle.activation_directory, tmp_path / "activation")
    return Path(shutil.copy(exact_bundle.model_file, tmp_path))


@pytest.fixture
def subject(file: Path) -> Subject:
    return open_subject(BenchConfig(file=file))


def sums(subject: Subject, hot: HotNeurons, budget: int | None) -> dict[str, dict[str, int]]:
    placed = place(subject, hot, budget, ROOM)
    assert placed["budget_bytes"] == budget
    return {device["name"]: device["bytes"] for device in placed["devices"]}


def test_without_a_gpu_all_is_on_the_cpu(subject: Subject) -> None:
    found = sums(subject, read_hot_neurons(subject), None)
    assert set(found) == {"CPU"}
    assert set(found["CPU"]) == set(PLACED_KINDS)
    tensors = sum(info.size for info in subject.file.tensors.values())
    hyper = subject.engine.hyper
    cache = 2 * 2 * hyper.n_layers * ROOM * hyper.n_kv_heads * hyper.head_dim
    assert found["CPU"]["kv_cache"] == cache
    assert sum(found["CPU"].values()) == tensors + cache
    assert found["CPU"]["predictors"] == hyper.n_layers * 2 * 128 * (hyper.d_model + hyper.d_ff)
    assert found["CPU"]["ffn_neurons"] == hyper.n_layers * 2 * 3 * hyper.d_model * hyper.d_ff


def test_with_room_for_all_only_the_embedding_stays_on_the_cpu(subject: Subject) -> None:
    found = sums(subject, read_hot_neurons(subject), 1 << 30)
    assert {kind for kind, size in found["CPU"].items() if size} == {"embedding"}
    alone = sums(subject, HotNeurons(), None)["CPU"]
    neurons = subject.engine.hyper.n_layers * subject.engine.hyper.d_ff
    for kind in set(PLACED_KINDS) - {"embedding", "ffn_neurons"}:
        assert found["GPU"][kind] == alone[kind]
    assert found["GPU"]["ffn_neurons"] == alone["ffn_neurons"] + BUCKET_BYTES * neurons


def test_the_index_says_which_neurons_are_on_the_gpu(file: Path) -> None:
    subject = open_subject(BenchConfig(file=file))
    all_of_it = sums(subject, read_hot_neurons(subject), 1 << 30)["GPU"]
    budget = sum(all_of_it.values()) - all_of_it["ffn_neurons"] // 2
    made = split(SplitConfig(file=file, vram_budget=str(budget), context=ROOM))
    subject = open_subject(BenchConfig(file=file))
    hot = read_hot_neurons(subject)
    found = sums(subject, hot, budget)
    moved = found["GPU"]["ffn_neurons"]
    assert all_of_it["ffn_neurons"] > moved == made.ffn_bytes_in_vram > 0
    shares = [layer_shares(hot, layer)["neuron_share_on_gpu"] for layer in range(2)]
    assert tuple(shares) == made.layers
    curve = frequency_curve(hot)
    assert curve is not None
    assert curve["gpu_activation_share"] == pytest.approx(made.activation_share_on_gpu)
    assert curve["gpu_neuron_share"] == pytest.approx(made.neuron_share_on_gpu)
    # More than is left: PowerInfer refuses the index and lets its solver fill what there is.
    less = budget - moved // 2
    assert 0 < sums(subject, hot, less)["GPU"]["ffn_neurons"] < moved
    assert sums(subject, replace(hot, counts=None), less)["GPU"]["ffn_neurons"] == 0


def test_an_index_that_is_damaged_is_told_not_used(file: Path) -> None:
    index_path(file).write_bytes(b"nonsense")
    hot = read_hot_neurons(open_subject(BenchConfig(file=file)))
    assert hot.chosen is None
    assert hot.problem is not None
    assert ".gpuidx" in hot.problem
    assert hot.counts is not None


def test_statistics_that_are_damaged_are_refused(file: Path) -> None:
    (file.parent / "activation" / "activation_1.pt").unlink()
    with refused(PredictorError, "activation"):
        read_hot_neurons(open_subject(BenchConfig(file=file)))


def test_without_statistics_nothing_is_said_of_hot_neurons(file: Path) -> None:
    shutil.rmtree(file.parent / "activation")
    hot = read_hot_neurons(open_subject(BenchConfig(file=file)))
    assert frequency_curve(hot) is None
    assert set(layer_shares(hot, 0).values()) == {None}


def test_the_curve_adds_up_the_most_active_neurons_of_all_layers() -> None:
    counts = [torch.tensor([70] + [0] * 99), torch.tensor([20, 10] + [0] * 98)]
    mask = torch.zeros(100, dtype=torch.bool)
    chosen = [mask.index_fill(0, torch.tensor([0]), True), mask]
    curve = frequency_curve(HotNeurons(counts=counts, chosen=chosen))
    assert curve is not None
    assert curve["activation_share"][:3] == pytest.approx([0.0, 0.9, 1.0])
    assert curve["activation_share"][-1] == pytest.approx(1.0)
    assert len(curve["activation_share"]) == len(curve["neuron_share"]) == 101
    assert curve["gpu_activation_share"] == pytest.approx(0.7)
    assert curve["gpu_neuron_share"] == pytest.approx(1 / 200)
    silent = frequency_curve(HotNeurons(counts=[torch.zeros(10, dtype=torch.int64)]))
    assert silent is not None
    assert set(silent["activation_share"]) == {0.0}


MIB = 1 << 20
CARD = Gpu(name="card", memory_bytes=1000 * MIB, free_bytes=900 * MIB)
MACHINE = Machine(cpu="cpu", cpus=1, memory_bytes=1, gpus=(CARD,))


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
    subject: Subject,
    cuda: bool | None,
    asked: str | None,
    gpus: tuple[Gpu, ...],
    expected: int | None,
) -> None:
    facts = ProgramFacts(path=Path("main"), kind="powerinfer", version=None, cuda=cuda)
    real = replace(subject, powerinfer_facts=facts)
    config = BenchConfig(file=subject.file.path, powerinfer_bin=Path("bin"), vram_budget=asked)
    assert vram_budget(config, real, replace(MACHINE, gpus=gpus)) == expected
    assert vram_budget(config, subject, MACHINE) is None
