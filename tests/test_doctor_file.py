"""The doctor on a model file and what lies beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_export
from safetensors import safe_open
from test_doctor_environment import CARD, told

from common.finding import Finding, Status
from common.machine import Gpu
from common.units import GIB
from gguf_export.bundle import Bundle
from gguf_export.gpu_split import split
from gguf_export.manifest import manifest_path
from gguf_export.pwri.gpu_index import index_path, read_gpu_index, write_gpu_index
from gguf_export.settings import SplitConfig
from gguf_files.reader import GGUFFile
from powerinfer_bridge.doctor.companions import IndexFacts, absent, index_finding
from powerinfer_bridge.doctor.model_files import (
    check_file,
    checkpoint_findings,
    export_bytes,
    open_checkpoint,
)

FILE = Path("m.powerinfer.gguf")
INDEX = IndexFacts(
    neurons=640, total=2000, capacity=1 << 20, needed=1 << 20, older=False, share=0.8, best=0.8
)


@pytest.fixture
def file(exact_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of an export."""
    directory = tmp_path / "export"
    shutil.copytree(exact_bundle.model_file.parent, directory)
    path = directory / exact_bundle.model_file.name
    manifest_path(path).unlink()  # the counts are others
    # Counts of a made-up text, no two alike: what is best is then best alone.
    for layer in range(2):
        generator = torch.Generator().manual_seed(layer)
        counts = torch.randperm(1012, generator=generator) + 1012 * layer
        torch.save(counts, directory / "activation" / f"activation_{layer}.pt")
    return path


@pytest.fixture
def index(file: Path) -> Path:
    """The index of a budget that all but some neurons fit."""
    split(SplitConfig(file=file, vram_budget="1MiB"))
    return index_path(file)


def examine(path: Path, *gpus: Gpu) -> list[Finding]:
    return list(check_file(path, gpus))


def test_a_sound_export_is_ok(file: Path) -> None:
    findings = examine(file)
    assert {f.check: f.status.value for f in findings} == {
        "file": "ok",
        "statistics": "ok",
        "GPU index": "note",
        "predictors": "ok",
    }
    assert "d_ff 1012, matrices F16" in told(findings, "file")[1]


def test_no_tensor_of_the_model_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object) -> None:
        raise AssertionError(f"{arguments} was read")

    monkeypatch.setattr(GGUFFile, "tensor", read)
    assert told(examine(file), "file")[0] == "ok"


def patch(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) >= 1
    path.write_bytes(data.replace(old, new, 1))


def uint32(key: bytes, number: int) -> bytes:
    return key + (4).to_bytes(4, "little") + number.to_bytes(4, "little")


FFN = b"llama.feed_forward_length"


@pytest.mark.parametrize(
    ("damage", "check", "part"),
    [
        (lambda p: p.unlink(), "file", "No such file"),
        (lambda p: p.write_bytes(b""), "file", "is empty"),
        (lambda p: p.write_bytes(p.read_bytes()[:5000]), "file", "more than the file can hold"),
        (lambda p: patch(p, b"PWRI", b"GGUF"), "file: magic", "runs the file densely"),
        (lambda p: patch(p, uint32(FFN, 1012), uint32(FFN, 768)), "file", "d_ff is 768"),
        (lambda p: patch(p, uint32(FFN, 1012), uint32(FFN, 1024)), "file: shapes", "shape"),
        (lambda p: patch(p, b"llama", b"mamba"), "file: keys", "mamba"),
        (lambda p: patch(p, b"blk.1.ffn_up", b"blk.1.ffn_xx"), "file: tensor set", "ffn_up"),
    ],
)
def test_a_bad_file_is_told_with_a_remedy_and_nothing_beside_it_is_judged(
    file: Path, damage: Callable[[Path], object], check: str, part: str
) -> None:
    damage(file)
    findings = examine(file)
    assert {finding.status for finding in findings} == {Status.PROBLEM}
    _, found, remedy = told(findings, check)
    assert part in found
    assert remedy
    assert all("not checked" not in finding.found for finding in findings)


def test_types_that_powerinfer_misreads(file: Path) -> None:
    name = b"blk.0.ffn_up.weight" + (2).to_bytes(4, "little")
    sizes = (64).to_bytes(8, "little") + (1012).to_bytes(8, "little")
    patch(file, name + sizes + (1).to_bytes(4, "little"), name + sizes + (8).to_bytes(4, "little"))
    status, found, _ = told(examine(file), "file: types")
    assert (status, "Q8_0, expected F16 or Q4_0" in found) == ("problem", True)


def test_no_statistics(file: Path) -> None:
    shutil.rmtree(file.parent / "activation")
    assert told(examine(file), "statistics")[0] == "note"
    assert told(examine(file, CARD), "statistics")[0] == "warning"
    assert "all neurons stay on the CPU" in told(examine(file, CARD), "GPU index")[1]


@pytest.mark.parametrize(
    ("counts", "status", "part"),
    [
        ({0: None}, "problem", "holds no statistics of 2 layers"),
        ({1: torch.ones(7)}, "problem", "7 counts, the model has 1012"),
        ({2: torch.ones(1012)}, "warning", "holds 3 files, the model has 2 layers"),
        ({0: torch.zeros(1012), 1: torch.zeros(1012)}, "warning", "no neuron was ever active"),
    ],
)
def test_statistics_that_are_not_this_models(
    file: Path, counts: dict[int, torch.Tensor | None], status: str, part: str
) -> None:
    for layer, content in counts.items():
        path = file.parent / "activation" / f"activation_{layer}.pt"
        path.unlink() if content is None else torch.save(content, path)
    found = told(examine(file), "statistics")
    assert found[0] == status
    assert part in found[1]


def test_two_models_in_one_directory(file: Path) -> None:
    (file.parent / "other.powerinfer.gguf").touch()
    first, second = (f for f in examine(file) if f.check == "statistics")
    assert (first.status.value, second.status.value) == ("ok", "warning")
    assert "other.powerinfer.gguf" in second.found


def test_statistics_beside_a_file_without_predictors_are_another_s(
    file: Path, model_dir: Path
) -> None:
    none = make_export(model_dir, Path("none"), file.with_name("none.powerinfer.gguf")).model_file
    (found,) = (f for f in examine(none, CARD) if f.check == "statistics")
    assert (found.status.value, "not its own" in found.found) == ("note", True)
    assert told(examine(file), "statistics")[0] == "ok"


@pytest.mark.parametrize(
    ("n_layers", "statistics", "gpu", "status", "part"),
    [
        (2, True, False, "note", "only builds with CUDA read one"),
        (2, False, True, "warning", "no statistics"),
        (10, True, True, "warning", "run its own solver"),
        (11, True, True, "warning", "mixes up the statistics of 11 layers"),
    ],
)
def test_what_follows_without_an_index(
    n_layers: int, statistics: bool, gpu: bool, status: str, part: str
) -> None:
    memory = 24 * GIB if gpu else 0
    found = absent(FILE, n_layers, has_statistics=statistics, has_gpu=gpu, memory=memory)
    assert found.status.value == status
    assert part in found.found
    assert ("mixes up" in found.found) == (n_layers > 10)
    if statistics and gpu:
        assert found.remedy == "psp gpu-split m.powerinfer.gguf --vram-budget 23.7GiB"


def test_an_index_of_our_own_is_ok(file: Path, index: Path) -> None:
    for gpus in ((), (CARD,)):
        status, found, _ = told(examine(file, *gpus), "GPU index")
        assert status == "ok"
        assert "% of activations" in found


def test_an_index_of_other_statistics_is_stale(file: Path, index: Path) -> None:
    for layer in range(2):
        path = file.parent / "activation" / f"activation_{layer}.pt"
        torch.save(torch.load(path, weights_only=True).flip(0), path)
    status, found, remedy = told(examine(file), "GPU index")
    assert (status, "of other statistics" in found) == ("warning", True)
    assert remedy == f"psp gpu-split {file} --vram-budget SIZE --force"


def test_an_index_that_lies_about_its_size(file: Path, index: Path) -> None:
    chosen, capacity = read_gpu_index(index, 2, 1012)
    write_gpu_index(index, chosen, capacity // 2)
    assert "its neurons take" in told(examine(file), "GPU index")[1]


def test_an_index_that_the_card_has_no_room_for(file: Path, index: Path) -> None:
    small = replace(CARD, memory=(256 << 20) + (900 << 10))
    status, found, _ = told(examine(file, small), "GPU index")
    assert status == "problem"
    assert "PowerInfer refuses it and writes over it" in found


@pytest.mark.parametrize("damage", [b"", b"PWRI", b"not an index at all"])
def test_a_damaged_index_is_a_problem(file: Path, index: Path, damage: bytes) -> None:
    index.write_bytes(damage)
    findings = examine(file)
    status, found, remedy = told(findings, "GPU index")
    assert (status, found.startswith(f"{index}: ")) == ("problem", True)
    assert remedy == f"psp gpu-split {file} --vram-budget SIZE --force"
    assert told(findings, "predictors")[0] == "ok"


def test_an_index_of_another_model_is_a_problem(file: Path) -> None:
    write_gpu_index(index_path(file), [torch.zeros(1012, dtype=torch.bool)] * 3, 0)
    assert told(examine(file), "GPU index")[0] == "problem"


def test_without_statistics_age_tells(file: Path, index: Path) -> None:
    shutil.rmtree(file.parent / "activation")
    assert told(examine(file), "GPU index")[0] == "ok"
    os.utime(index, (1, 1))
    status, found, _ = told(examine(file), "GPU index")
    assert (status, "older than the model file" in found) == ("warning", True)


def test_an_old_index_that_agrees_with_the_statistics_is_ok(file: Path, index: Path) -> None:
    os.utime(index, (1, 1))
    assert told(examine(file), "GPU index")[0] == "ok"


def test_an_index_without_neurons() -> None:
    found = index_finding(replace(INDEX, neurons=0, capacity=0, needed=0), FILE)
    assert (found.status, "puts no neuron" in found.found) == (Status.WARNING, True)


@pytest.mark.parametrize(
    ("change", "status", "part"),
    [
        ({"layers": 0}, "warning", "holds 0 layers, the file 2"),
        ({"threshold": -1.0}, "warning", "says threshold -1.0, the file 0"),
        ({"config": None}, "warning", "says threshold None"),
        ({"config": "[]"}, "problem", "expected a JSON object"),
        ({"directory": None}, "note", "PowerInfer does not need it"),
    ],
)
def test_the_predictor_directory(
    file: Path, change: dict[str, object], status: str, part: str
) -> None:
    directory = file.with_name("exact.predictors")
    if "layers" in change:
        (directory / "model_0.pt").unlink()
    if "threshold" in change:
        (directory / "config.json").write_text('{"sparse_threshold": -1.0}')
    if "config" in change:
        content = change["config"]
        path = directory / "config.json"
        path.unlink() if content is None else path.write_text(str(content))
    if "directory" in change:
        shutil.rmtree(directory)
    found = told(examine(file), "predictors")
    assert found[0] == status
    assert part in found[1]


def test_a_checkpoint_and_the_file_made_from_it(model_dir: Path, exact_bundle: Bundle) -> None:
    checkpoint = open_checkpoint(model_dir)
    first, second = checkpoint_findings(checkpoint, exact_bundle.model_file)
    assert "relu, 2 layers, d_model 64, d_ff 1012" in first.found
    assert second.status is Status.OK
    numbers = 0
    with safe_open(model_dir / "model.safetensors", "pt") as tensors:
        numbers = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    assert export_bytes(checkpoint) == 2 * (numbers + 2 * 2 * 32 * (64 + 1012))


def test_a_file_of_another_model(
    make_model: Callable[..., Path], exact_bundle: Bundle, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", seed=5)
    findings = checkpoint_findings(open_checkpoint(other), exact_bundle.model_file)
    assert told(findings, "file's model")[0] == "warning"
