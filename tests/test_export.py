"""The export bundle: every byte that PowerInfer reads, and what is refused instead of written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import ModelMaker, write_predictors
from conftest import make_export as run
from gguf import GGMLQuantizationType, TokenType
from gguf import GGUFValueType as Kind
from safetensors.torch import load_file, save_file

from architectures.checkpoint import Checkpoint
from common.errors import CheckpointError, ExportError, PredictorError, PspError
from common.sealed import SEAL
from gguf_export.bundle import Bundle
from gguf_export.manifest import MANIFEST
from gguf_files.reader import GGUFFile
from predictor.artifact import PredictorArtifact

KEYS: dict[str, tuple[Any, ...]] = {
    "general.architecture": (Kind.STRING, b"llama"),
    "general.name": (Kind.STRING, b"random-reglu"),
    "general.file_type": (Kind.UINT32, 1),
    "llama.context_length": (Kind.UINT32, 128),
    "llama.embedding_length": (Kind.UINT32, 64),
    "llama.block_count": (Kind.UINT32, 2),
    "llama.feed_forward_length": (Kind.UINT32, 1012),
    "llama.rope.dimension_count": (Kind.UINT32, 16),
    "llama.attention.head_count": (Kind.UINT32, 4),
    "llama.attention.head_count_kv": (Kind.UINT32, 2),
    "llama.attention.layer_norm_rms_epsilon": (Kind.FLOAT32, float(np.float32(1e-5))),
    "llama.rope.freq_base": (Kind.FLOAT32, 10000.0),
    "tokenizer.ggml.model": (Kind.STRING, b"llama"),
    "tokenizer.ggml.tokens": (Kind.ARRAY, Kind.STRING),
    "tokenizer.ggml.scores": (Kind.ARRAY, Kind.FLOAT32),
    "tokenizer.ggml.token_type": (Kind.ARRAY, Kind.INT32),
    "tokenizer.ggml.bos_token_id": (Kind.UINT32, 1),
    "tokenizer.ggml.eos_token_id": (Kind.UINT32, 2),
    "tokenizer.ggml.unknown_token_id": (Kind.UINT32, 0),
    "powerinfer.sparse_threshold": (Kind.FLOAT32, 0.0),
    "psp.activation_threshold": (Kind.FLOAT32, 0.0),
}
PROVENANCE = {
    "psp.version",
    "psp.model_fingerprint",
    "psp.recipe",
    "psp.activation",
    "psp.predictor_type",
}
SAME = {
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@pytest.fixture(scope="session")
def exact_file(exact_bundle: Bundle) -> GGUFFile:
    return GGUFFile(exact_bundle.model_file)


def files(root: Path) -> set[str]:
    found = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)) for path in found if not path.name.endswith(MANIFEST)}


def exported(model: Path, tmp_path: Path) -> GGUFFile:
    """Export a model with exact predictors of its own."""
    write_predictors(model, tmp_path / "predictors")
    out = tmp_path / "out" / "m.powerinfer.gguf"
    return GGUFFile(run(model, tmp_path / "predictors", out).model_file)


def refusal(error: type[PspError], model: Path, predictors: Path, tmp_path: Path) -> str:
    """Export something impossible: one line with a remedy, and nothing left behind."""
    out = tmp_path / "out" / "m.powerinfer.gguf"
    with pytest.raises(error) as caught:
        run(model, predictors, out)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, repr(message)
    assert files(out.parent) == set(), "half a bundle would stand in the way of the next attempt"
    problem, _, remedy = message.rpartition("; ")
    assert problem, f"no remedy in {message!r}"
    assert remedy
    return message


def naive_permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleave the halves of every head, row by row."""
    size = len(weight) // heads
    out = torch.empty_like(weight)
    for head in range(heads):
        for pair in range(size // 2):
            out[head * size + 2 * pair] = weight[head * size + pair]
            out[head * size + 2 * pair + 1] = weight[head * size + size // 2 + pair]
    return out


def assert_bits(file: GGUFFile, name: str, expected: torch.Tensor) -> None:
    found = file.tensor(f"{name}.weight")
    assert found.shape == tuple(expected.shape), name
    dtype = torch.float32 if expected.dim() == 1 else torch.float16
    assert found.tobytes() == expected.to(dtype).contiguous().numpy().tobytes(), name


def test_the_first_bytes_say_sparse_and_version_3(exact_bundle: Bundle) -> None:
    assert exact_bundle.model_file.read_bytes()[:8] == bytes.fromhex("50575249 03000000")


def test_header_bytes_are_those_written_by_hand(exact_bundle: Bundle) -> None:
    content = exact_bundle.model_file.read_bytes()
    assert content[8:16] == bytes.fromhex("1900000000000000"), "25 tensors"
    # general.architecture, a string (8) of 5 bytes; then the next key's length and first bytes
    first = "1400000000000000 67656e6572616c2e617263686974656374757265 08000000"
    assert content[24:].startswith(bytes.fromhex(f"{first} 0500000000000000 6c6c616d61"))
    threshold = "1b00000000000000 706f776572696e6665722e7370617273655f7468726573686f6c64"
    assert bytes.fromhex(f"{threshold} 06000000 00000000") in content, "float32 (6), 0.0"
    # blk.0.ffn_down_t.weight, 2 dimensions, 64 and 1012, F16 (1)
    down = "1700000000000000 626c6b2e302e66666e5f646f776e5f742e776569676874 02000000"
    assert bytes.fromhex(f"{down} 4000000000000000 f403000000000000 01000000") in content


def test_keys_and_their_types_are_exactly_these(exact_file: GGUFFile) -> None:
    assert set(exact_file.values) == KEYS.keys() | PROVENANCE
    for name, (kind, expected) in KEYS.items():
        value = exact_file.values[name]
        assert value.kind is kind, name
        assert (value.element if kind is Kind.ARRAY else value.data) == expected, name


def test_provenance_names_the_model_and_the_recipe(exact_file: GGUFFile, model_dir: Path) -> None:
    found = {key: exact_file.value(key, Kind.STRING) for key in PROVENANCE}
    assert found["psp.activation"] == "relu"
    assert found["psp.model_fingerprint"] == Checkpoint.open(model_dir).fingerprint
    assert json.loads(found["psp.recipe"]) == {"name": "made by hand"}
    assert found["psp.predictor_type"] == "f16"


def test_tensors_are_exactly_these_with_matrices_f16_and_vectors_f32(exact_file: GGUFFile) -> None:
    parts = [*SAME, "attn_q", "attn_k", "ffn_down_t", "fc1", "fc2"]
    expected = {f"blk.{layer}.{part}.weight" for layer in (0, 1) for part in parts}
    expected |= {"token_embd.weight", "output_norm.weight", "output.weight"}
    assert set(exact_file.tensors) == expected
    for info in exact_file.tensors.values():
        matrix = len(info.shape) == 2
        kind = GGMLQuantizationType.F16 if matrix else GGMLQuantizationType.F32
        assert info.kind is kind, info.name


def test_weights_are_the_checkpoint_s_bit_for_bit(exact_file: GGUFFile, model_dir: Path) -> None:
    weights = load_file(model_dir / "model.safetensors")
    assert_bits(exact_file, "token_embd", weights["model.embed_tokens.weight"])
    assert_bits(exact_file, "output_norm", weights["model.norm.weight"])
    assert_bits(exact_file, "output", weights["lm_head.weight"])
    for layer in (0, 1):
        source = f"model.layers.{layer}"
        for ours, theirs in SAME.items():
            assert_bits(exact_file, f"blk.{layer}.{ours}", weights[f"{source}.{theirs}.weight"])
        down = weights[f"{source}.mlp.down_proj.weight"]
        assert_bits(exact_file, f"blk.{layer}.ffn_down_t", down.T)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (4, 1), (2, 1)])
def test_query_and_key_rows_are_interleaved_head_by_head(
    make_model: ModelMaker, tmp_path: Path, heads: int, kv_heads: int
) -> None:
    changes: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    model = make_model(tmp_path / "model", seed=1, **changes)
    file, stored = exported(model, tmp_path), load_file(model / "model.safetensors")
    for layer in (0, 1):
        for part, count in (("q", heads), ("k", kv_heads)):
            weight = stored[f"model.layers.{layer}.self_attn.{part}_proj.weight"]
            assert_bits(file, f"blk.{layer}.attn_{part}", naive_permute(weight, count))


def test_tied_embeddings_are_written_twice(make_model: ModelMaker, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    file, stored = exported(model, tmp_path), load_file(model / "model.safetensors")
    assert "lm_head.weight" not in stored
    for name in ("token_embd", "output"):
        assert_bits(file, name, stored["model.embed_tokens.weight"])


def test_predictors_are_the_artifact_s_in_both_forms(
    exact_bundle: Bundle, exact_file: GGUFFile, exact_dir: Path
) -> None:
    artifact = PredictorArtifact.open(exact_dir)
    for layer in (0, 1):
        expected = artifact.layer(layer)
        file = exact_bundle.predictor_directory / f"model_{layer}.pt"
        loaded = torch.load(file, weights_only=True)
        assert set(loaded) == {"fc1.weight", "fc2.weight"}
        for part, tensor in (("fc1", expected.fc1), ("fc2", expected.fc2)):
            assert_bits(exact_file, f"blk.{layer}.{part}", tensor)
            assert loaded[f"{part}.weight"].dtype == torch.float16
            assert torch.equal(loaded[f"{part}.weight"], tensor)


def test_the_threshold_is_the_artifact_s(model_dir: Path, exact_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(exact_dir, tmp_path / "predictors")
    edit_index(tmp_path / "predictors", lambda index: index["header"].update(threshold=-0.5))
    bundle = run(model_dir, tmp_path / "predictors", tmp_path / "m.powerinfer.gguf")
    assert GGUFFile(bundle.model_file).value("powerinfer.sparse_threshold", Kind.FLOAT32) == -0.5
    config = json.loads((bundle.predictor_directory / "config.json").read_text())
    assert config == {"sparse_threshold": -0.5}


def test_activation_statistics_are_one_vector_of_counts_a_layer(exact_bundle: Bundle) -> None:
    for layer in (0, 1):
        file = exact_bundle.activation_directory / f"activation_{layer}.pt"
        counts = torch.load(file, weights_only=True)
        assert counts.dtype == torch.int64
        assert torch.equal(counts, torch.arange(1012))


def test_the_bundle_holds_these_files_and_no_other(exact_bundle: Bundle) -> None:
    assert files(exact_bundle.model_file.parent) == {
        "exact.powerinfer.gguf",
        "exact.predictors/config.json",
        "exact.predictors/model_0.pt",
        "exact.predictors/model_1.pt",
        "activation/activation_0.pt",
        "activation/activation_1.pt",
    }


def test_tokens_are_the_tokenizer_s_pieces(exact_file: GGUFFile, tokenizer_bytes: bytes) -> None:
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_bytes)
    pieces = [tokenizer.id_to_piece(number) for number in range(320)]
    assert pieces[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = exact_file.value("tokenizer.ggml.tokens", Kind.ARRAY, Kind.STRING)
    assert tokens == [piece.encode() for piece in pieces]
    scores = exact_file.value("tokenizer.ggml.scores", Kind.ARRAY, Kind.FLOAT32)
    assert scores.tolist() == [tokenizer.get_score(number) for number in range(320)]
    types = exact_file.value("tokenizer.ggml.token_type", Kind.ARRAY, Kind.INT32).tolist()
    assert types[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert types[3:] == [TokenType.BYTE] * 256 + [TokenType.NORMAL] * 61


def test_a_larger_embedding_is_padded_with_unused_tokens(
    make_model: ModelMaker, tmp_path: Path
) -> None:
    file = exported(make_model(tmp_path / "model", vocab_size=323), tmp_path)
    tokens = file.value("tokenizer.ggml.tokens", Kind.ARRAY, Kind.STRING)
    types = file.value("tokenizer.ggml.token_type", Kind.ARRAY, Kind.INT32).tolist()
    assert (len(tokens), len(set(tokens)), len(types)) == (323, 323, 323)
    assert types[320:] == [TokenType.UNUSED] * 3
    assert TokenType.UNUSED not in types[:320]


def test_two_exports_are_byte_identical_whatever_their_names(
    model_dir: Path, exact_dir: Path, exact_bundle: Bundle, tmp_path: Path
) -> None:
    name = "a 'b' \"c\" $(d) é"
    bundle = run(model_dir, exact_dir, tmp_path / "my 'own' dir" / f"{name}.powerinfer.gguf")
    first, second = exact_bundle.model_file.parent, bundle.model_file.parent
    assert {file.replace(name, "exact") for file in files(second)} == files(first)
    for file in files(first):
        copy = second / file.replace("exact", name)
        assert copy.read_bytes() == (first / file).read_bytes(), file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_stored_types_are_rounded_to_float16(
    model_dir: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = restored(model_dir, tmp_path / "model", dtype)
    file, stored = exported(model, tmp_path), load_file(model / "model.safetensors")
    assert_bits(file, "blk.1.ffn_up", stored["model.layers.1.mlp.up_proj.weight"])
    assert_bits(file, "output_norm", stored["model.norm.weight"])


def restored(model: Path, out: Path, dtype: torch.dtype, number: float = 0.0) -> Path:
    """Save a copy of a checkpoint in another type, with odd bits and one entry of choice."""
    shutil.copytree(model, out)
    generator = torch.Generator().manual_seed(0)
    stored = {
        name: (tensor.float() * (1 + torch.rand(tensor.shape, generator=generator) / 64)).to(dtype)
        for name, tensor in load_file(out / "model.safetensors").items()
    }
    stored["model.layers.1.mlp.up_proj.weight"][3, 4] = number
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    return out


def edit_index(predictors: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = predictors / "predictors.json"
    document = json.loads(file.read_text())
    document.pop(SEAL)
    change(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("number", "error", "name", "problem"),
    [
        (1e6, ExportError, "blk.1.ffn_up.weight", "does not fit float16"),
        (-1e6, ExportError, "blk.1.ffn_up.weight", "does not fit float16"),
        (
            float("nan"),
            CheckpointError,
            "model.layers.1.mlp.up_proj.weight",
            "1 NaN and 0 infinite",
        ),
        (
            float("inf"),
            CheckpointError,
            "model.layers.1.mlp.up_proj.weight",
            "0 NaN and 1 infinite",
        ),
    ],
)
def test_a_weight_beyond_float16_is_refused_by_name(
    model_dir: Path,
    tmp_path: Path,
    dtype: torch.dtype,
    number: float,
    error: type[PspError],
    name: str,
    problem: str,
) -> None:
    model = restored(model_dir, tmp_path / "model", dtype, number)
    write_predictors(model, tmp_path / "predictors")
    message = refusal(error, model, tmp_path / "predictors", tmp_path)
    assert f"tensor {name}" in message
    assert problem in message


def test_predictors_of_another_model_are_refused(
    make_model: ModelMaker, exact_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", seed=5)
    message = refusal(PredictorError, other, exact_dir, tmp_path)
    assert f"{exact_dir}: predictors were trained for {model_dir}" in message
    assert f"differ from {other}; pass that model or collect and train" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"intermediate_size": 1024},
            "the model needs (rank, 64) and (1024, rank)",
        ),
        ({"num_hidden_layers": 3}, "predictors have 2 layers, the model has 3"),
        ({"hidden_size": 128}, "fc1 (128, 64) and fc2 (1012, 128), the model needs (rank, 128)"),
    ],
)
def test_predictors_of_other_sizes_are_refused(
    make_model: ModelMaker, exact_dir: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    model = make_model(tmp_path / "model", **changes)
    message = refusal(PredictorError, model, exact_dir, tmp_path)
    assert f"{exact_dir}: " in message
    assert problem in message
    assert message.endswith("; pass predictors of this model")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (
            lambda path: edit_index(path, lambda index: index["layers"].pop()),
            "the first is 1; finish with 'psp train-predictor ... --resume'",
        ),
        (lambda path: (path / "layer-01.safetensors").unlink(), "layer-01.safetensors: missing"),
        (lambda path: (path / "layer-00.safetensors").write_bytes(bytes(9)), "damaged"),
        (lambda path: (path / "predictors.json").unlink(), "predictors.json: No such file"),
    ],
)
def test_incomplete_predictors_are_refused(
    model_dir: Path, exact_dir: Path, tmp_path: Path, damage: Callable[[Path], object], problem: str
) -> None:
    predictors = tmp_path / "predictors"
    shutil.copytree(exact_dir, predictors)
    damage(predictors)
    message = refusal(PredictorError, model_dir, predictors, tmp_path)
    assert str(predictors) in message
    assert problem in message
    assert not (tmp_path / "out").exists()


def test_sizes_that_powerinfer_cannot_run_are_refused(
    make_model: ModelMaker, model_dir: Path, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}
    model = make_model(tmp_path / "48", **sizes)
    write_predictors(model, tmp_path / "wide")
    message = refusal(ExportError, model, tmp_path / "wide", tmp_path)
    assert "d_model 48 is no multiple of 32" in message
    zeros = torch.zeros(48, 64), torch.zeros(1012, 48)
    write_predictors(model_dir, tmp_path / "narrow", lambda gate: zeros)
    message = refusal(ExportError, model_dir, tmp_path / "narrow", tmp_path)
    assert "rank 48 is no multiple of 32" in message


def test_an_ffn_that_powerinfer_would_compute_wrongly_is_refused(
    make_model: ModelMaker, tmp_path: Path
) -> None:
    """Up to 1000 neurons it takes a kernel with another skip rule."""
    model = make_model(tmp_path / "model", intermediate_size=1000)
    write_predictors(model, tmp_path / "predictors")
    message = refusal(ExportError, model, tmp_path / "predictors", tmp_path)
    assert message == "d_ff 1000 is below 1001; PowerInfer computes smaller FFNs wrongly"
