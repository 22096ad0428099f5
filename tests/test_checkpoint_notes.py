"""What a user may not expect of a directory is said once by every command that reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import TEXT, ModelMaker, write_predictors
from safetensors.torch import load_file, save_file

from architectures.checkpoint import Checkpoint
from common.finding import Status
from gguf_files.reader import GGUFFile
from powerinfer_bridge.doctor.model_files import checkpoint_findings
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.engine.perplexity import perplexity, perplexity_windows
from powerinfer_bridge.programs.powerinfer import PowerInfer

Psp = Callable[..., Result]
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def odd_dir(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose config denies its head, beside the index of an earlier save."""
    path = make_model(tmp_path_factory.mktemp("odd") / "model", tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    assert HEAD not in tensors
    torch.manual_seed(1)
    tensors[HEAD] = 0.15 * torch.randn(320, 64).half()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {HEAD: "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.fixture(scope="module")
def predictors(odd_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_predictors(odd_dir, path := tmp_path_factory.mktemp("exact") / "predictors")
    return path


def assert_told(result: Result) -> None:
    assert result.exit_code == 0, result.output
    json.loads(result.stdout)
    told = result.stderr
    assert told.count("a head that differs is stored") == 1
    assert told.count("model.safetensors.index.json beside it is passed over") == 1


def test_collect_sparsity_and_generate_say_it_on_standard_error(
    psp: Psp, odd_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    data = ("--data", data_file, "--tokens", 300, "--json")
    assert_told(psp("collect", "--model", odd_dir, *data, "--out", tmp_path / "traces"))
    assert_told(psp("sparsity", "--model", odd_dir, *data))
    assert_told(psp("generate", "--model", odd_dir, "--prompt", "def", "-n", 2, "--json"))


def test_the_doctor_says_it_among_its_notes(odd_dir: Path) -> None:
    checkpoint = Checkpoint.open(odd_dir)
    found = list(checkpoint_findings(checkpoint, None))
    assert len(checkpoint.notes) == 2
    assert [f.found for f in found if f.status is Status.NOTE] == list(checkpoint.notes)


def test_sparsify_says_it_and_keeps_the_head_apart(
    psp: Psp, odd_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "two.yaml").write_text(
        "stages:\n- {kind: progressive, lambda: 0.1, until_step: 2}\n"
    )
    settings = ("--context", 16, "--batch", 1, "--schedule", tmp_path / "two.yaml")
    out = ("--out", tmp_path / "sparse", "--precision", "bfloat16", "--json")
    result = psp("sparsify", "--model", odd_dir, "--data", data_file, *settings, *out)
    assert_told(result)
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    trained = load_file(tmp_path / "sparse" / "model.safetensors")
    stored = load_file(odd_dir / "model.safetensors")
    torch.testing.assert_close(trained[HEAD], stored[HEAD], atol=1e-2, rtol=0)


def test_an_exported_file_has_the_stored_head(
    psp: Psp, odd_dir: Path, predictors: Path, data_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "x.powerinfer.gguf"
    result = psp(
        "export-gguf", "--model", odd_dir, "--predictors", predictors, "--out", file, "--json"
    )
    assert_told(result)
    assert json.loads(result.stdout)["verified"]
    assert_told(psp("verify", file, "--model", odd_dir, "--json"))
    small = ("--ctx", 32, "--chunks", 1, "-n", 2, "--data", data_file, "--json")
    assert_told(psp("bench-powerinfer", file, "--model", odd_dir, *small))
    head = GGUFFile(file).tensor("output.weight")
    expected = load_file(odd_dir / "model.safetensors")[HEAD]
    assert np.array_equal(np.asarray(head, np.float32), expected.float().numpy())


@pytest.mark.powerinfer
def test_the_real_powerinfer_has_the_perplexity_of_transformers(
    psp: Psp, odd_dir: Path, predictors: Path, powerinfer_bin: Path, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    file = tmp_path / "x.powerinfer.gguf"
    psp("export-gguf", "--model", odd_dir, "--predictors", predictors, "--out", file)
    text, context = TEXT * 6, 32
    real = PowerInfer(powerinfer_bin).perplexity(file, text, context, None, threads=1)
    model = LlamaForCausalLM.from_pretrained(odd_dir, dtype=torch.float32).eval()
    ids = [1, *Engine(file).vocabulary.encode(text.removesuffix("\n"))]

    @torch.inference_mode()
    def evaluate(window: list[int]) -> torch.Tensor:
        logits: torch.Tensor = model(torch.tensor([window])).logits[0]
        return logits

    theirs = perplexity(evaluate, perplexity_windows(ids, 1, context), "transformers")
    assert theirs == pytest.approx(real, rel=0.005)
