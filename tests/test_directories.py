"""Directories that hold no checkpoint, or one of another kind: each is called by its name."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import huggingface_hub
import pytest
import torch
from directories import bare_llama, configure, tensors_of
from families import save_tensors
from safetensors.torch import save_file

from architectures.checkpoint import Checkpoint
from common.errors import CheckpointError

refused = partial(conftest.refused, CheckpointError)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Return an untied LLaMA without its weights' file."""
    return bare_llama(tmp_path / "model")


QUERY = "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("renamed", "parts"),
    [
        ({"weight": "qweight"}, [f"{QUERY}qweight", "quantised", "original"]),
        ({"weight": "weight_packed"}, [f"{QUERY}weight_packed", "quantised", "original"]),
        ({"weight": "base_layer.weight", "": "lora_A.weight"}, ["lora_A", "merge_and_unload"]),
    ],
    ids=["gptq", "compressed-tensors", "lora"],
)
def test_names_that_tell_why_a_tensor_is_missing_are_named(
    llama: Path, renamed: dict[str, str], parts: list[str]
) -> None:
    tensors = tensors_of(llama, 1)
    tensor = tensors.pop(f"{QUERY}weight")
    save_tensors(tensors | {f"{QUERY}{n}": tensor.clone() for n in renamed.values()}, llama, "bin")
    with refused(f"tensor {QUERY}weight is missing", *parts):
        Checkpoint.open(llama)


@pytest.mark.parametrize("inner", ["language_model.model.", "model.language_model."])
def test_a_language_model_among_other_tensors_is_named(llama: Path, inner: str) -> None:
    """Vision wrappers of before and since transformers 4.52 put it at either place."""
    tensors = {name.replace("model.", inner): t for name, t in tensors_of(llama, 1).items()}
    save_tensors(tensors | {"vision.weight": torch.zeros(3)}, llama, "safetensors")
    with refused(f"{inner}embed_tokens.weight is there", "language model alone"):
        Checkpoint.open(llama)


def test_float64_is_called_by_its_name(llama: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in tensors_of(llama, 1).items()}
    save_tensors(tensors, llama, "safetensors")
    with refused("is float64", "save the model in float32"):
        Checkpoint.open(llama)


FILES: dict[str, tuple[dict[str, str], list[str]]] = {
    "LoRA": (
        {"adapter_config.json": '{"base_model_name_or_path": "meta-llama/x"}'},
        ["a LoRA adapter", "'meta-llama/x'", "merge_and_unload"],
    ),
    "LoRA, damaged": ({"adapter_config.json": "[" * 9999}, ["a LoRA adapter", "its base model"]),
    "GGUF": ({"b.gguf": "", "a.Q4_0.gguf": ""}, ["GGUF", "--model {}/a.Q4_0.gguf (or b.gguf)"]),
    "split GGUF": (
        {"x-00002-of-00002.gguf": "", "x-00001-of-00002.gguf": ""},
        ["--model {}/x-00001-of-00002.gguf"],
    ),
    "ONNX": ({"onnx/model.onnx": ""}, ["ONNX", "made of"]),
    "diffusers": ({"model_index.json": "{}", "unet/config.json": "{}"}, ["diffusers"]),
    "sentence-transformers": ({"modules.json": "[]"}, ["sentence-transformers", "no text"]),
    "Meta's": (
        {"consolidated.00.pth": "", "params.json": "{}"},
        ["convert_llama_weights_to_hf.py"],
    ),
    "DeepSpeed": ({"zero_to_fp32.py": "", "latest": ""}, ["DeepSpeed", "zero_to_fp32.py"]),
    "FSDP": ({"pytorch_model_fsdp_0/__0_0.distcp": ""}, ["FSDP", "accelerate merge-weights"]),
    "TensorFlow": ({"tf_model.h5": ""}, ["TensorFlow"]),
    "JAX": ({"flax_model.msgpack": ""}, ["JAX"]),
    "predictors": ({"predictors.json": "{}"}, ["traces or predictors of psp's"]),
    "head": ({"head.json": "{}"}, ["traces or predictors of psp's"]),
    "traces": (
        {"manifest.json": "{}", "layer-00/weights.safetensors": ""},
        ["traces or predictors of psp's"],
    ),
    "one above": (
        {"b/config.json": "{}", "a/config.json": "{}"},
        ["folders that hold one", "--model {}/a (or b)"],
    ),
    "the hub's cache": (
        {"snapshots/0123/config.json": "{}", "refs/main": "0123"},
        ["--model {}/snapshots/0123"],
    ),
    "empty": ({}, ["is empty"]),
}


@pytest.mark.parametrize("configured", [False, True], ids=["", "with config.json"])
@pytest.mark.parametrize(("files", "parts"), FILES.values(), ids=FILES)
def test_a_directory_of_another_kind_is_called_by_its_name(
    llama: Path, tmp_path: Path, files: dict[str, str], parts: list[str], configured: bool
) -> None:
    path = tmp_path / "other"
    path.mkdir()
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True, parents=True)
        (path / name).write_text(content)
    if configured:
        shutil.copy(llama / "config.json", path / "config.json")
    if configured and not files:
        parts = ["holds no weights"]
    with refused(str(path), *(part.format(path) for part in parts)):
        Checkpoint.open(path)


@pytest.mark.usefixtures("hub_answers")
@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (
            ["README.md", "b.gguf", "part/a-00001-of-00002.gguf", "part/a-00002-of-00002.gguf"],
            ["holds GGUF files", "--model owner/name:part/a-00001-of-00002.gguf (or b.gguf, part"],
        ),
        (["onnx/model.onnx"], ["holds ONNX graphs", "made of"]),
        (["consolidated.00.pth"], ["publisher's own layout", "Hugging Face version"]),
        (["a/config.json"], ["no weights"]),
        (["README.md"], ["holds no model", "Hugging Face checkpoint"]),
    ],
    ids=["GGUF", "ONNX", "Meta's", "folders", "nothing"],
)
def test_a_repository_of_another_kind_is_called_by_its_name(
    llama: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], parts: list[str]
) -> None:
    """Most of its files are not fetched; where none is, there is no directory."""
    place = llama.with_name("gone") if files == ["README.md"] else llama
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(place))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: files)
    with refused(*parts):
        Checkpoint.open("owner/name")


def test_weights_under_other_names_are_listed(llama: Path) -> None:
    save_file({"a": torch.zeros(1)}, llama / "model.fp16.safetensors")
    with refused("holds no weights", "model.fp16.safetensors", "pytorch_model.bin"):
        Checkpoint.open(llama)


def test_a_model_with_an_adapter_beside_it_is_read_without_it(llama: Path) -> None:
    save_tensors(tensors_of(llama, 1), llama, "safetensors")
    assert not Checkpoint.open(llama).notes
    (llama / "adapter_config.json").write_text("{}")
    (line,) = Checkpoint.open(llama).notes
    assert "LoRA adapter" in line
    assert "passed over" in line


def test_a_file_in_the_place_of_its_directory_is_called_one(llama: Path) -> None:
    save_tensors(tensors_of(llama, 1), llama, "safetensors")
    with refused("is a file", f"--model {llama}"):
        Checkpoint.open(llama / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"architectures": ["LlavaForConditionalGeneration"], "text_config": {}},
            ["LlavaForConditionalGeneration", "text_config", "language model alone"],
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, ["'gptq'", "quantised", "original"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["'fp8'", "quantised", "original"]),
        ({"quantization": {"bits": 4}}, ["quantised", "original"]),
    ],
)
def test_a_config_of_another_kind_of_model_is_called_by_its_name(
    llama: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    save_tensors(tensors_of(llama, 1), llama, "safetensors")
    configure(llama, **changes)
    with refused("config.json", *parts):
        Checkpoint.open(llama)
