"""Commands from end to end on files instead of directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker, write_predictors
from test_gguf_checkpoint import write_file

from architectures.checkpoint import Checkpoint
from architectures.model import load_model
from predictor.traces.store import TraceStore
from prosparse.activation import open_with_relu

WINDOW = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def silu(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("silu") / "model", hidden_act="silu")


@pytest.fixture(scope="module")
def sparse_file(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "model.powerinfer.gguf"
    return write_file(Checkpoint.open(model_dir), path)


def logits_of(model: str | Path) -> torch.Tensor:
    loaded = load_model(Checkpoint.open(model), dtype=torch.float32, device="cpu")
    return loaded.logits(WINDOW)


def test_traces_of_a_file_are_those_of_its_checkpoint(
    model_dir: Path, sparse_file: Path, long_data: Path, psp: Callable[..., Any], tmp_path: Path
) -> None:
    """The models' weights are float16 in both, so that nothing is rounded."""
    stores = []
    for name, model in (("d", model_dir), ("f", sparse_file)):
        arguments = (
            "--data",
            long_data,
            "--field",
            "body",
            "--tokens",
            300,
            "--out",
            tmp_path / name,
        )
        assert psp("collect", "--model", model, *arguments).exit_code == 0
        stores.append(TraceStore.open(tmp_path / name))
    directory, file = stores
    assert directory.header.model_fingerprint == file.header.model_fingerprint
    ours, theirs = (sorted((tmp_path / n).glob("layer-*/*.safetensors")) for n in ("f", "d"))
    assert len(ours) == len(theirs) > 2
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.read_bytes() == other.read_bytes(), mine.name


def test_predictors_of_a_file_s_traces_are_measured_on_it(
    sparse_file: Path, long_data: Path, psp: Callable[..., Any], tmp_path: Path
) -> None:
    arguments = ("--data", long_data, "--field", "body", "--tokens", 1500, "--out", tmp_path / "t")
    assert psp("collect", "--model", sparse_file, *arguments).exit_code == 0
    made = psp(
        *("train-predictor", "--traces", tmp_path / "t", "--out", tmp_path / "p"),
        *("--recipe", "svd", "--rank", 32, "--max-ppl-gap", "900%", "--json"),
    )
    assert made.exit_code == 0, made.output


def test_a_file_is_verified_against_the_file_that_it_was_made_of(
    model_dir: Path, psp: Callable[..., Any], tmp_path: Path
) -> None:
    write_predictors(model_dir, tmp_path / "p")
    out = tmp_path / "out" / "model.powerinfer.gguf"
    made = psp("export-gguf", "--model", model_dir, "--predictors", tmp_path / "p", "--out", out)
    assert made.exit_code == 0, made.output
    found = psp("verify", out, "--model", out, "--json")
    assert found.exit_code == 0, found.output
    assert "model tensors" in found.output


def test_sparsify_makes_a_directory_that_transformers_reads(
    silu: Path, long_data: Path, psp: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dense = write_file(open_with_relu(str(silu)), tmp_path / "model.gguf", sparse=False)
    # As llama.cpp's converter writes it: without a word about the activation.
    dense.write_bytes(dense.read_bytes().replace(b"psp.activation", b"not.activation"))
    out = tmp_path / "out"
    arguments = (
        "--data",
        long_data,
        "--field",
        "body",
        "--context",
        32,
        "--batch",
        2,
        "--scale",
        0.0005,
        "--eval-windows",
        4,
    )
    made = psp("sparsify", "--model", dense, *arguments, "--out", out)
    assert made.exit_code == 0, made.output
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert model.config.hidden_act == "relu"
    with torch.no_grad():
        torch.testing.assert_close(logits_of(out), model(WINDOW).logits, atol=1e-4, rtol=1e-4)
    theirs, ours = AutoTokenizer.from_pretrained(out), open_with_relu(str(silu)).tokenizer()
    for text in ("the  cat", " sat.", "on\n\nthe mat"):
        assert theirs(text).input_ids == [ours.bos_id(), *ours.encode(text)]


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_threshold_found_on_a_file_is_written_as_a_directory(
    sparse_file: Path, tmp_path: Path, per_layer: bool
) -> None:
    from prosparse.shifted_checkpoint import write_shifted

    out, checkpoint = tmp_path / "shifted", Checkpoint.open(sparse_file)
    thresholds = (0.2, 0.4) if per_layer else (0.2, 0.2)
    written = write_shifted(checkpoint, thresholds, out, {})
    shifted = Checkpoint.open(out)
    assert (shifted.shape.activation, shifted.shape.activation_threshold) == ("fatrelu", written)
    assert shifted.dtype == torch.float16
    gate = shifted.architecture.rule(shifted.architecture.gate)
    for layer, threshold in enumerate(thresholds):
        scaled = checkpoint.read(gate, layer).double() * (written / threshold)
        found = shifted.read(gate, layer).double()
        torch.testing.assert_close(found, scaled, rtol=2**-11, atol=1e-7)
    assert shifted.tokenizer().encode("the cat") == checkpoint.tokenizer().encode("the cat")
