"""Checkpoints: what is read from them, and every way in which they are refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import huggingface_hub
import pytest
import sentencepiece
import torch
from conftest import TEXT, ModelMaker
from safetensors.torch import load_file, save_file

from architectures.checkpoint import Checkpoint
from architectures.model import load_model
from architectures.registry import ARCHITECTURES
from architectures.tokenizer import load_sentencepiece, load_tokenizer
from common.errors import CheckpointError

INDEX = "model.safetensors.index.json"
GATE = "model.layers.1.mlp.gate_proj.weight"


refused = partial(conftest.refused, CheckpointError)


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    """Return a copy of the model that a test may damage."""
    return Path(shutil.copytree(model_dir, tmp_path / "copy"))


@pytest.fixture
def sharded(make_model: ModelMaker, tmp_path: Path) -> Path:
    """Return the model of `model_dir` in several shards."""
    return make_model(tmp_path / "sharded", shards="50KB")


def edit(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes a key."""
    document = json.loads(file.read_text()) | changes
    kept = {key: value for key, value in document.items() if value is not None}
    file.write_text(json.dumps(kept))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a checkpoint of one shard."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def all_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {
        checkpoint.source(rule, layer): checkpoint.read(rule, layer)
        for rule in checkpoint.architecture.tensors
        for layer in range(checkpoint.shape.n_layers if rule.per_layer else 1)
    }


def test_open_reads_the_sizes_of_the_model(model_dir: Path) -> None:
    checkpoint = Checkpoint.open(model_dir)
    assert checkpoint.architecture.name == "llama"
    assert vars(checkpoint.shape) == {
        "d_model": 64,
        "d_ff": 1012,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        "context_length": 128,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tied_embeddings": False,
        "activation": "relu",
        "activation_threshold": 0.0,
        "embedding_scale": 1.0,
        "residual_scale": 1.0,
        "output_scale": 1.0,
        "rope_scaling": None,
        "experts": None,
        "attention": None,
    }


def test_tensors_come_as_stored(model_dir: Path) -> None:
    checkpoint = Checkpoint.open(str(model_dir))
    stored = load_file(model_dir / "model.safetensors")
    read = all_tensors(checkpoint)
    assert read.keys() == stored.keys()
    for name, tensor in read.items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, stored[name])
    assert torch.equal(checkpoint.layer_tensor(1, "mlp.gate_proj.weight"), stored[GATE])


def test_shards_make_no_difference(model_dir: Path, sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole, parts = Checkpoint.open(model_dir), Checkpoint.open(sharded)
    assert parts.shape == whole.shape
    assert parts.fingerprint == whole.fingerprint
    read = all_tensors(parts)
    for name, tensor in all_tensors(whole).items():
        assert torch.equal(read[name], tensor)


def test_tied_embeddings_need_no_head(make_model: ModelMaker, tmp_path: Path) -> None:
    model = make_model(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(model / "model.safetensors")
    checkpoint = Checkpoint.open(model)
    head = next(rule for rule in checkpoint.architecture.tensors if rule.tied_to)
    assert checkpoint.shape.tied_embeddings
    assert checkpoint.source(head) == "model.embed_tokens.weight"


def test_the_rotary_base_is_read_from_the_new_and_the_old_key(copy: Path) -> None:
    new = {"rope_theta": 5e5, "rope_type": "default"}
    edit(copy / "config.json", rope_parameters=new, rope_theta=None)
    assert Checkpoint.open(copy).shape.rope_theta == 5e5
    edit(copy / "config.json", rope_parameters=None, rope_theta=7e5)
    assert Checkpoint.open(copy).shape.rope_theta == 7e5
    edit(copy / "config.json", rope_theta=None)
    assert Checkpoint.open(copy).shape.rope_theta == 1e4


def test_a_fingerprint_names_the_weights_not_the_place(
    make_model: ModelMaker, model_dir: Path, copy: Path, tmp_path: Path
) -> None:
    original = Checkpoint.open(model_dir).fingerprint
    assert Checkpoint.open(copy).fingerprint == original
    assert Checkpoint.open(make_model(tmp_path / "other", seed=1)).fingerprint != original
    edit(copy / "config.json", rms_norm_eps=1e-6)
    assert Checkpoint.open(copy).fingerprint != original


def test_every_layer_counts_in_the_fingerprint(model_dir: Path, copy: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[GATE][0, 0] += 1

    rewrite(copy, change)
    assert Checkpoint.open(copy).fingerprint != Checkpoint.open(model_dir).fingerprint


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with refused(str(tmp_path / "gone"), "no such directory", "pass a checkpoint's directory"):
        Checkpoint.open(tmp_path / "gone")


@pytest.mark.usefixtures("hub_answers")
def test_a_hub_id_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **options: Any) -> str:
        raise ConnectionError("no route to host\nmore\nlines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with refused("owner/name", "no route to host", "check the name, the network"):
        Checkpoint.open("owner/name")


@pytest.mark.usefixtures("hub_answers")
@pytest.mark.parametrize("kind", ["safetensors", "bin", "named"])
def test_a_hub_id_is_fetched_without_code_and_bin_files_only_where_there_is_nothing_else(
    model_dir: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    calls: list[set[str]] = []
    if kind == "bin":
        torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
        (copy / "model.safetensors").unlink()
    if kind == "named":
        edit(copy / "config.json", transformers_weights="best.safetensors")
        (copy / "model.safetensors").rename(copy / "best.safetensors")

    def download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "owner/name"
        calls.append(set(allow_patterns))
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Checkpoint.open("owner/name").path == copy
    always = {"*.json", "model*.safetensors", "tokenizer.model", "merges.txt", "*.jinja"}
    more = {"safetensors": [], "bin": [{"pytorch_model*.bin"}], "named": [{"*.safetensors"}]}[kind]
    assert calls == [always, *(always | each for each in more)]


def test_a_directory_without_config_is_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    with refused(str(copy / "config.json"), "No such file", "a Hugging Face model directory"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("content", ["{", "", "[]", "\x00"])
def test_a_config_that_is_no_json_object_is_refused(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    with refused(str(copy / "config.json"), "JSON", "a Hugging Face model directory"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("found", [["GPT2LMHeadModel"], ["LlamaModel"], [], None, 3])
def test_an_unsupported_class_is_named_and_the_supported_are_listed(
    copy: Path, found: object
) -> None:
    edit(copy / "config.json", architectures=found, model_type="gpt2")
    supported = [name for family in ARCHITECTURES for name in family.hf_classes]
    assert "LlamaForCausalLM" in supported
    with refused("config.json", f"architectures is {found!r}", "supported: ", *supported):
        Checkpoint.open(copy)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_act": "silu"}, ["hidden_act is 'silu'", "'relu'", "ReLU-fication"]),
        ({"hidden_act": None}, ["hidden_act is None", "'relu'", "ReLU-fication"]),
        ({"mlp_bias": True}, ["mlp_bias is True", "expected false", "no biases"]),
        ({"attention_bias": True}, ["attention_bias is True", "expected false", "no biases"]),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "rope_theta": 1e4}},
            ["rope_type is 'llama3'", "'default'", "PowerInfer scales positions in no other way"],
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            ["rope_type is 'dynamic'", "'default'", "PowerInfer scales positions in no other way"],
        ),
        ({"head_dim": 15, "hidden_size": 60}, ["head_dim is 15", "even"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads is 3", "a divisor of 4"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "float16", "original"]),
        ({"hidden_size": None}, ["hidden_size is None", "an integer from 1", "mend"]),
        ({"hidden_size": 64.0}, ["hidden_size is 64.0", "an integer from 1", "mend"]),
        ({"intermediate_size": "1012"}, ["intermediate_size is '1012'", "an integer", "mend"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0", "an integer from 1", "mend"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers is True", "an integer", "mend"]),
        ({"vocab_size": 1 << 40}, ["vocab_size is 1099511627776", "an integer", "mend"]),
        ({"num_attention_heads": -4}, ["num_attention_heads is -4", "an integer", "mend"]),
        ({"num_attention_heads": 5, "head_dim": None}, ["num_attention_heads is 5", "64"]),
        ({"rms_norm_eps": "tiny"}, ["rms_norm_eps is 'tiny'", "number", "mend"]),
        ({"rope_parameters": None, "rope_theta": "x"}, ["rope_theta is 'x'", "number", "mend"]),
        ({"rope_parameters": "linear"}, ["rope_parameters is 'linear'", "mend"]),
    ],
    ids=lambda value: (
        ", ".join(f"{k}={v}" for k, v in value.items()) if type(value) is dict else ""
    ),
)
def test_a_config_that_powerinfer_cannot_run_is_refused_by_its_key(
    copy: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    edit(copy / "config.json", **changes)
    with refused("config.json", *parts):
        Checkpoint.open(copy)


def test_a_missing_only_shard_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with refused(str(copy), "no weights", "model.safetensors", "fetch the checkpoint again"):
        Checkpoint.open(copy)


def test_a_shard_that_the_index_lists_must_be_there(sharded: Path) -> None:
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with refused(str(lost), "shard is missing", "fetch the checkpoint again"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("size", [0, 4, 100, -1], ids=["empty", "4 B", "100 B", "less 1 B"])
def test_a_truncated_shard_is_refused(copy: Path, size: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with refused(str(file), "truncated or damaged", "fetch the checkpoint again"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("name", [GATE, "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(copy: Path, name: str) -> None:
    rewrite(copy, lambda tensors: tensors.__delitem__(name))
    with refused(str(copy), f"tensor {name} is missing", "fetch the checkpoint again"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("shape", [(64, 1012), (1012, 32), (1012 * 64,)])
def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(
    copy: Path, shape: tuple[int, ...]
) -> None:
    rewrite(copy, lambda tensors: tensors.update({GATE: torch.zeros(shape)}))
    with refused(GATE, f"has shape {shape}", "(1012, 64)", "fetch the checkpoint again"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_cannot_lead_out_of_the_directory(copy: Path, shard: str) -> None:
    shutil.move(copy / "model.safetensors", copy.parent / "model.safetensors")
    (copy / INDEX).write_text(json.dumps({"weight_map": {GATE: shard}}))
    with refused(str(copy), shard, "fetch the checkpoint again"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": ["a"]}', "{", "[]"])
def test_an_index_without_a_map_is_refused(copy: Path, content: str) -> None:
    (copy / "model.safetensors").unlink()
    (copy / INDEX).write_text(content)
    with refused(str(copy / INDEX), "fetch the checkpoint again"):
        Checkpoint.open(copy)


def test_the_tokenizer_is_the_checkpoints_own(model_dir: Path) -> None:
    tokenizer = load_sentencepiece(model_dir, 320)
    assert tokenizer.bos_id() == 1
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_missing_tokenizer_is_refused(copy: Path) -> None:
    (copy / "tokenizer.model").unlink()
    with refused(str(copy / "tokenizer.model"), "not found", "SentencePiece tokenizer.model"):
        load_sentencepiece(copy, 320)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 1000], ids=["empty", "text", "0"])
def test_a_damaged_tokenizer_is_refused(copy: Path, content: bytes) -> None:
    (copy / "tokenizer.model").write_bytes(content)
    with refused(str(copy / "tokenizer.model"), "SentencePiece", "fetch the checkpoint again"):
        load_tokenizer(copy, 320)


def test_a_tokenizer_without_bos_is_refused(copy: Path) -> None:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=buffer,
        model_type="char",
        vocab_size=60,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (copy / "tokenizer.model").write_bytes(buffer.getvalue())
    with refused(str(copy / "tokenizer.model"), "BOS"):
        load_tokenizer(copy, 320)


def test_a_tokenizer_with_more_pieces_than_the_model_has_rows_is_refused(model_dir: Path) -> None:
    file, size = model_dir / "tokenizer.model", load_sentencepiece(model_dir, 320).vocab_size()
    assert load_sentencepiece(model_dir, size).vocab_size() == size
    with refused(str(file), f"{size} pieces", f"{size - 1} rows", "the model's own tokenizer"):
        load_tokenizer(model_dir, size - 1)


def test_a_loaded_model_has_the_checkpoints_weights_and_is_ready_to_run(model_dir: Path) -> None:
    checkpoint = Checkpoint.open(model_dir)
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    assert not model.causal_lm.training
    assert len(model.blocks) == 2
    for number, layer in enumerate(model.blocks):
        loaded = layer.get_parameter("mlp.gate_proj.weight")
        stored = checkpoint.layer_tensor(number, "mlp.gate_proj.weight")
        assert torch.equal(loaded, stored.float())


def test_a_device_that_is_not_there_is_refused(model_dir: Path) -> None:
    with refused("cannot run on device 'nonsense'", "--device"):
        load_model(Checkpoint.open(model_dir), dtype=torch.float32, device="nonsense")
