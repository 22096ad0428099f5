"""Directories as people keep them: what transformers loads from each, psp reads too, or refuses.

The right values come from transformers' own loader: which file it takes, which head, what it would
fill with random numbers.
"""

from __future__ import annotations

import itertools
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from families import BY_NAME, random_tensors, save_tensors, write
from safetensors.torch import save_file

from architectures.checkpoint import Checkpoint
from architectures.model import load_model
from common.errors import CheckpointError

TOKENS = torch.arange(12, 36)[None]
HEAD = "lm_head.weight"
AGAIN = "fetch the checkpoint again"

refused = partial(conftest.refused, CheckpointError)


def theirs(path: Path) -> tuple[Any, set[str]]:
    """Return what transformers makes of a directory, and the weights that it had to invent."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    return model.eval(), set(info["missing_keys"])


@torch.inference_mode()
def agree(path: Path) -> Checkpoint:
    """Open a directory and compare its logits with transformers' own."""
    checkpoint = Checkpoint.open(path)
    model, invented = theirs(path)
    assert not invented
    ours = load_model(checkpoint, dtype=torch.float32, device="cpu").logits(TOKENS)
    expected = model(input_ids=TOKENS, use_cache=False).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)
    return checkpoint


def clear(path: Path) -> None:
    """Remove the weights of a directory."""
    for pattern in ("*.safetensors*", "*.bin*"):
        for file in path.glob(pattern):
            file.unlink()


def configure(path: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one."""
    file = path / "config.json"
    found = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Return an untied LLaMA without its weights' file."""
    path = write(BY_NAME["relu-llama"], tmp_path / "model", b"").path
    clear(path)
    return path


def tensors_of(path: Path, seed: int) -> dict[str, torch.Tensor]:
    variant = BY_NAME["relu-llama"]
    config = json.loads((path / "config.json").read_text())
    return random_tensors(variant.shapes(config), torch.float32, seed)


KINDS = ("safetensors", "sharded safetensors", "bin", "sharded bin")
CHOSEN = {
    "safetensors": "model.safetensors",
    "sharded safetensors": "model.safetensors.index.json",
    "bin": "pytorch_model.bin",
    "sharded bin": "pytorch_model.bin.index.json",
}
MIXES = [mix for size in range(1, 5) for mix in itertools.combinations(KINDS, size)]


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: " + ".join(mix))
def test_of_several_sets_of_weights_the_one_that_transformers_loads_is_read(
    llama: Path, mix: tuple[str, ...]
) -> None:
    for kind in mix:
        save_tensors(tensors_of(llama, KINDS.index(kind)), llama, kind)
    model, invented = theirs(llama)
    assert not invented
    checkpoint = Checkpoint.open(llama)
    state = model.state_dict()
    for rule in checkpoint.architecture.tensors:
        name = rule.source.format(layer=1)
        assert torch.equal(checkpoint.read(rule, 1), state[name])
    notes = "\n".join(checkpoint.notes)
    for kind in mix[1:]:
        assert CHOSEN[kind] in notes
    assert (CHOSEN[mix[0]] in notes) == (len(mix) > 1)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_index_whose_shards_are_gone_does_no_harm_beside_a_whole_file(
    llama: Path, kind: str
) -> None:
    save_tensors(tensors_of(llama, 1), llama, f"sharded {kind}")
    for shard in llama.glob("*-of-*"):
        shard.unlink()
    with refused("shard is missing", AGAIN):
        Checkpoint.open(llama)
    save_tensors(tensors_of(llama, 2), llama, kind)
    assert f"{CHOSEN[f'sharded {kind}']} beside it" in "\n".join(agree(llama).notes)


@pytest.mark.parametrize("kind", ["safetensors", "sharded safetensors"])
def test_the_weights_that_the_config_names_come_first(llama: Path, kind: str) -> None:
    save_tensors(tensors_of(llama, 1), llama, kind)
    name = CHOSEN[kind].replace("model", "other")
    (llama / CHOSEN[kind]).rename(llama / name)
    save_tensors(tensors_of(llama, 2), llama, "safetensors")
    configure(llama, transformers_weights=name)
    notes = agree(llama).notes
    assert any(name in line and "model.safetensors beside it" in line for line in notes)


@pytest.mark.parametrize(
    "name", ["x.bin", "../x.safetensors", "a/x.safetensors", 3, "x.safetensors"]
)
def test_named_weights_that_transformers_would_refuse_are_refused(
    llama: Path, name: object
) -> None:
    save_tensors(tensors_of(llama, 1), llama, "safetensors")
    shutil.copy(llama / "model.safetensors", llama.parent / "x.safetensors")
    configure(llama, transformers_weights=name)
    with refused("transformers_weights"):
        Checkpoint.open(llama)


TIES = [True, False, None]
STORED = ["embedding", "head", "both alike", "both"]
_ACTIVATION: dict[str, dict[str, Any]] = {"falcon-7b": {"activation": "relu", "hidden_act": None}}
TIED_FAMILIES = ["relu-llama", "relu-mistral", "opt-125m", "falcon-7b"]


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("name", TIED_FAMILIES)
def test_the_output_head_is_the_one_that_transformers_uses(
    tmp_path: Path, name: str, tie: bool | None, stored: str
) -> None:
    """Where transformers would invent one of both, there is a refusal."""
    # FalconConfig knows no hidden_act, which ReluFalcon's own code reads.
    variant = BY_NAME[name].changed(
        tie_word_embeddings=tie, sliding_window=None, **_ACTIVATION.get(name, {})
    )
    path = write(variant, tmp_path / "model", b"").path
    clear(path)
    tensors = random_tensors(variant.shapes(variant.config), torch.float32, 1)
    embedding = next(iter(tensors))
    tensors[HEAD] = torch.randn_like(tensors[embedding]) / 8
    if stored == "both alike":
        tensors[HEAD] = tensors[embedding]
    if stored in ("embedding", "head"):
        del tensors[HEAD if stored == "embedding" else embedding]
    save_tensors(tensors, path, "bin" if stored == "both alike" else "safetensors")
    tied = variant.family in ("opt", "falcon") if tie is None else tie
    if stored in ("embedding", "head") and not tied:
        _, invented = theirs(path)
        assert invented == {HEAD if stored == "embedding" else embedding}
        with refused(f"tensor {HEAD if stored == 'embedding' else embedding} is missing"):
            Checkpoint.open(path)
        return
    checkpoint = agree(path)
    assert checkpoint.shape.tied_embeddings == (tied and stored != "both")
    told = any("tie_word_embeddings" in line for line in checkpoint.notes)
    assert told == (tied and stored == "both")


def test_one_number_makes_a_head_another_tensor(tmp_path: Path) -> None:
    written = write(BY_NAME["llama-tied"], tmp_path / "model", b"")
    tensors = dict(written.tensors)
    tensors[HEAD] = tensors["model.embed_tokens.weight"].clone()
    save_tensors(tensors, written.path, "safetensors")
    assert Checkpoint.open(written.path).shape.tied_embeddings
    tensors[HEAD][-1, -1] += 1
    save_tensors(tensors, written.path, "safetensors")
    assert not Checkpoint.open(written.path).shape.tied_embeddings


@pytest.mark.parametrize("declared", [None, [], ["LlamaModel"]])
@pytest.mark.parametrize("tie", [True, False])
def test_model_type_tells_the_class_where_architectures_does_not(
    tmp_path: Path, declared: list[str] | None, tie: bool
) -> None:
    written = write(BY_NAME["llama-tied"].changed(tie_word_embeddings=tie), tmp_path / "model", b"")
    clear(written.path)
    configure(written.path, architectures=declared)
    bare = {name.removeprefix("model."): t for name, t in written.tensors.items() if name != HEAD}
    save_tensors(bare, written.path, "safetensors")
    if tie:
        assert agree(written.path).architecture.name == "llama"
        return
    assert theirs(written.path)[1] == {HEAD}
    with refused(f"tensor {HEAD} is missing", "without its output head", "causal language model"):
        Checkpoint.open(written.path)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "base_model.model."]
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_wrapper_puts_before_every_name_is_left_out_with_a_note(
    llama: Path, kind: str, prefix: str
) -> None:
    tensors = tensors_of(llama, 3)
    save_tensors({prefix + name: tensor for name, tensor in tensors.items()}, llama, kind)
    checkpoint = Checkpoint.open(llama)
    assert any(repr(prefix) in line for line in checkpoint.notes)
    for rule in checkpoint.architecture.tensors:
        assert torch.equal(checkpoint.read(rule, 1), tensors[rule.source.format(layer=1)])


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


def test_a_language_model_among_other_tensors_is_named(llama: Path) -> None:
    tensors = {f"language_model.{name}": t for name, t in tensors_of(llama, 1).items()}
    save_tensors(tensors | {"vision.weight": torch.zeros(3)}, llama, "safetensors")
    with refused("language_model.model.embed_tokens.weight is there", "language model alone"):
        Checkpoint.open(llama)


def test_float64_is_called_by_its_name(llama: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in tensors_of(llama, 1).items()}
    save_tensors(tensors, llama, "safetensors")
    with refused("is float64", "save the model in float32"):
        Checkpoint.open(llama)


POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pointer_of_git_lfs_in_the_place_of_weights_is_called_one(llama: Path, kind: str) -> None:
    save_tensors(tensors_of(llama, 1), llama, kind)
    file = sorted(f for f in llama.iterdir() if f.suffix in (".safetensors", ".bin"))[-1]
    file.write_text(POINTER)
    with refused(str(file), "Git LFS pointer", "git lfs pull"):
        Checkpoint.open(llama)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_in_the_place_of_a_text_is_called_one(llama: Path, name: str) -> None:
    save_tensors(tensors_of(llama, 1), llama, "safetensors")
    (llama / name).write_text(POINTER)
    with refused(str(llama / name), "Git LFS pointer", "git lfs pull"):
        Checkpoint.open(llama)


def test_a_pointer_that_is_passed_over_does_no_harm(llama: Path) -> None:
    save_tensors(tensors_of(llama, 1), llama, "safetensors")
    (llama / "pytorch_model.bin").write_text(POINTER)
    agree(llama)


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
    "predictors": ({"predictors.json": "{}"}, ["an output of psp's"]),
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
