"""Files of SmallThinker for either engine: written, read as a model, verified and refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import refused
from families import Written, write
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from mixtures import MIXTURES
from rewriting import rewritten, stored

from architectures.checkpoint import Checkpoint
from architectures.model import load_model
from common.errors import CheckpointError, ExportError, PredictorError
from gguf_export.dense import export_single
from gguf_export.settings import ExportConfig
from gguf_files.names import PROFILER
from gguf_files.reader import GGUFFile
from powerinfer_bridge.verify.verification import verify
from predictor.head.run import train_head
from predictor.head.settings import HeadConfig

BY_NAME = {variant.name: variant for variant in MIXTURES}
WIDE: dict[str, Any] = {"hidden_size": 256, "moe_ffn_hidden_size": 512}
"""Sizes that PowerInfer's second engine can take."""


def made(path: Path, tokenizer: bytes, name: str, **changes: Any) -> Written:
    variant = replace(BY_NAME[name], files="safetensors").changed(**changes)
    return write(variant, path, tokenizer)


def export(written: Written, out: Path, engine: str = "llama.cpp", **options: Any) -> Path:
    config = ExportConfig(model=str(written.path), out=out, engine=engine, **options)
    return export_single(config).model_file


@pytest.mark.parametrize("name", ["smallthinker-4b", "smallthinker-21b", "smallthinker-softmax"])
def test_a_file_holds_the_tensors_and_keys_of_llama_cpps_converter(
    tmp_path: Path, tokenizer_bytes: bytes, name: str
) -> None:
    written = made(tmp_path / "model", tokenizer_bytes, name)
    reader = GGUFReader(export(written, tmp_path / "out.gguf"))
    found = {tensor.name: tensor for tensor in reader.tensors}
    expected = dict(stacked(written))
    assert found.keys() == expected.keys()
    for tensor, numbers in expected.items():
        data = numbers.half().numpy() if numbers.dim() > 1 else numbers.float().numpy()
        if "gate_inp" in tensor:
            data = numbers.float().numpy()
        assert found[tensor].data.dtype == data.dtype, tensor
        assert np.array_equal(found[tensor].data, data), tensor
    c = written.variant.config
    keys = {
        "expert_count": c["moe_num_primary_experts"],
        "expert_used_count": c["moe_num_active_primary_experts"],
        "expert_feed_forward_length": 32,
        "feed_forward_length": 32,
        "expert_gating_func": 1 if name.endswith("softmax") else 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.sliding_window": 4096 if name.endswith("21b") else None,
    }
    for key, value in keys.items():
        field = reader.get_field(f"smallthinker.{key}")
        assert (None if field is None else field.contents()) == value, key


def stacked(written: Written, *, transposed: bool = False) -> Any:
    """Yield names and numbers of a file, from the checkpoint's tensors alone."""
    names = {
        "model.embed_tokens.weight": "token_embd",
        "model.norm.weight": "output_norm",
        "lm_head.weight": "output",
    }
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "block_sparse_moe.primary_router": "ffn_gate_inp",
    }
    c, tensors = written.variant.config, written.tensors
    for source, target in names.items():
        if source in tensors:
            yield f"{target}.weight", tensors[source]
    for layer in range(c["num_hidden_layers"]):
        for source, target in parts.items():
            yield f"blk.{layer}.{target}.weight", tensors[f"model.layers.{layer}.{source}.weight"]
        for part in ("gate", "up", "down"):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts"
            all_of_it = [
                tensors[f"{prefix}.{n}.{part}.weight"] for n in range(c["moe_num_primary_experts"])
            ]
            numbers = torch.stack([w.T if transposed and part == "down" else w for w in all_of_it])
            yield f"blk.{layer}.ffn_{part}_exps.weight", numbers


@pytest.mark.parametrize("name", ["smallthinker-4b", "smallthinker-21b", "smallthinker-softmax"])
def test_a_file_is_read_as_the_model_that_it_was_made_of(
    tmp_path: Path, tokenizer_bytes: bytes, name: str
) -> None:
    written = made(tmp_path / "model", tokenizer_bytes, name, **WIDE, torch_dtype="float16")
    tokens = torch.randint(12, 320, (1, 20), generator=torch.Generator().manual_seed(1))
    file = export(written, tmp_path / "out.gguf")
    logits = [
        load_model(Checkpoint.open(path, experts=True), dtype=torch.float32, device="cpu").logits(
            tokens
        )
        for path in (written.path, file)
    ]
    assert torch.equal(*logits)


def test_the_second_engines_file_holds_the_same_experts_transposed(
    tmp_path: Path, tokenizer_bytes: bytes
) -> None:
    written = made(tmp_path / "model", tokenizer_bytes, "smallthinker-21b", **WIDE)
    file = export(written, tmp_path / "out.smallthinker.gguf", "smallthinker")
    shapes = {tensor.name: tuple(tensor.shape) for tensor in GGUFReader(file).tensors}
    assert shapes["blk.3.ffn_down_exps.weight"] == shapes["blk.3.ffn_up_exps.weight"]
    other = export(written, tmp_path / "out.gguf", outtype="q8_0")
    one, two, own = (Checkpoint.open(path, experts=True) for path in (file, other, written.path))
    rule = own.architecture.rule("block_sparse_moe.experts.{expert}.down.weight")
    for expert in (0, 5):
        exact = own.read(rule, 3, expert).float()
        for checkpoint, error in ((one, 0.12), (two, 0.01)):
            difference = checkpoint.read(rule, 3, expert).float() - exact
            assert difference.norm() < error * exact.norm()


@pytest.mark.parametrize("engine", ["llama.cpp", "smallthinker"])
def test_an_exported_file_is_verified_against_its_model(
    tmp_path: Path, tokenizer_bytes: bytes, engine: str
) -> None:
    written = made(tmp_path / "model", tokenizer_bytes, "smallthinker-21b", **WIDE)
    other = made(tmp_path / "other", tokenizer_bytes, "smallthinker-4b", **WIDE)
    suffix = ".smallthinker.gguf" if engine == "smallthinker" else ".gguf"
    file = export(written, tmp_path / f"out{suffix}", engine)
    report = verify(file, str(written.path), context=64, chunks=2)
    assert report.ok, report.checks
    assert "6 experts of 512 neurons, 3 for a token" in report.checks["keys"].detail
    judged = "not judged" if engine == "smallthinker" else "at most"
    assert judged in report.checks["perplexity"].detail
    wrong = verify(file, str(other.path), run=False)
    failed = {name for name, outcome in wrong.checks.items() if not outcome.ok}
    assert failed == {"model fingerprint", "model sizes", "model tensors"}


def test_a_changed_expert_is_found(tmp_path: Path, tokenizer_bytes: bytes) -> None:
    written = made(tmp_path / "model", tokenizer_bytes, "smallthinker-4b")
    file = export(written, tmp_path / "out.gguf")
    tensor = next(t for t in GGUFReader(file).tensors if t.name == "blk.1.ffn_up_exps.weight")
    with file.open("r+b") as stream:
        stream.seek(int(tensor.data_offset) + 2 * 70)
        stream.write(np.float16(9.0).tobytes())
    report = verify(file, str(written.path), run=False)
    assert "blk.1.ffn_up_exps.weight differs" in report.checks["model tensors"].detail


REFUSED: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("smallthinker-4b", {"rope_layout": [1, 0, 1]}, ("rope_layout is 0 in layer 1",)),
    ("smallthinker-21b", {"rope_layout": [1] * 6}, ("rope_layout is 1 in layer 0",)),
    (
        "smallthinker-21b",
        {"sliding_window_layout": [0, 1, 1, 1, 1, 1]},
        ("sliding_window_layout is 1 in layer 4",),
    ),
    (
        "smallthinker-21b",
        {
            "num_hidden_layers": 4,
            "rope_layout": [0, 1, 1, 1],
            "sliding_window_layout": [0, 1, 1, 1],
        },
        ("rope_layout is 0 in layer 0", "not of 4"),
    ),
    ("smallthinker-window", {}, ("sliding_window_size is 5", "4096")),
)


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED)
def test_what_the_engines_would_compute_otherwise_is_refused(
    tmp_path: Path, tokenizer_bytes: bytes, name: str, changes: dict[str, Any], said: tuple[str]
) -> None:
    written = made(tmp_path / "model", tokenizer_bytes, name, **changes)
    with refused(ExportError, *said):
        export(written, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_window_that_no_context_reaches_is_no_reason_to_refuse(
    tmp_path: Path, tokenizer_bytes: bytes
) -> None:
    written = made(tmp_path / "model", tokenizer_bytes, "smallthinker-21b", sliding_window_size=128)
    assert verify(export(written, tmp_path / "out.gguf"), str(written.path), run=False).ok


def test_sizes_that_the_second_engine_cannot_take_are_refused(
    tmp_path: Path, tokenizer_bytes: bytes
) -> None:
    written = made(tmp_path / "model", tokenizer_bytes, "smallthinker-21b")
    with refused(ExportError, "d_ff 32 is no multiple of"):
        export(written, tmp_path / "out.smallthinker.gguf", "smallthinker")


@pytest.mark.parametrize("name", ["smallthinker-4b", "smallthinker-21b"])
def test_a_heads_predictor_goes_into_the_second_engines_file(
    tmp_path: Path, tokenizer_bytes: bytes, long_data: Path, name: str
) -> None:
    """Tied or not: with a predictor the head is one of its own, in whose rows its level is."""
    written = made(tmp_path / "model", tokenizer_bytes, name, **WIDE)
    head = HeadConfig(
        model=str(written.path),
        data=(str(long_data),),
        field="body",
        out=tmp_path / "head",
        tokens=2000,
        context=64,
        rank=32,
        recipe="svd",
        max_ppl_gap=9.0,
        max_changed=1.0,
    )
    train_head(head)
    out = tmp_path / "out.smallthinker.gguf"
    file = GGUFFile(export(written, out, "smallthinker", head_predictor=head.out))
    assert file.tensors[PROFILER].shape == (1, 32 * (256 + 320))
    assert file.tensors["output.weight"].kind is GGMLQuantizationType.Q4_0
    report = verify(out, str(written.path), context=16, chunks=2)
    assert {n: c.line for n, c in report.checks.items() if not c.ok} == {}
    assert "the head has a predictor" in report.checks["engine"].line
    numbers = np.roll(file.tensor("output.weight"), 1, axis=0)
    other = rewritten(
        out,
        tmp_path / "o.gguf",
        tensors={"output.weight": stored(numbers, GGMLQuantizationType.Q4_0)},
    )
    assert not verify(other, str(written.path), run=False).checks["model tensors"].ok
    with refused(PredictorError, "was made for another model"):
        third = made(tmp_path / "third", tokenizer_bytes, "smallthinker-softmax", **WIDE)
        export(third, tmp_path / "t.smallthinker.gguf", "smallthinker", head_predictor=head.out)


def test_a_file_that_does_not_say_how_experts_are_weighed_is_refused(
    tmp_path: Path, tokenizer_bytes: bytes
) -> None:
    """PowerInfer's own converter writes none for a sigmoid router."""
    written = made(tmp_path / "model", tokenizer_bytes, "smallthinker-4b")
    file = without_key(export(written, tmp_path / "out.gguf"), "smallthinker.expert_gating_func")
    with refused(CheckpointError, "expert_gating_func is missing", "second engine takes softmax"):
        Checkpoint.open(file, experts=True)
    assert not verify(file).checks["keys"].ok


def without_key(file: Path, key: str) -> Path:
    """Write a file again without one of its keys."""
    reader, out = GGUFReader(file), file.with_name("less.gguf")
    writer = GGUFWriter(out, "smallthinker")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in (key, "general.architecture"):
            kinds = field.types
            writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if kinds[1:] else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_commands_that_need_predictors_say_what_to_use(
    tmp_path: Path, tokenizer_bytes: bytes, psp: Callable[..., Result]
) -> None:
    written = made(tmp_path / "model", tokenizer_bytes, "smallthinker-4b")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a b c"}\n')
    model = ["--model", str(written.path)]
    collect = [*model, "--data", str(text), "--out", str(tmp_path / "t"), "--tokens", "100"]
    export_to = [*model, "--predictors", "none", "--out", str(tmp_path / "x.powerinfer.gguf")]
    for arguments in (["collect", *collect], ["export-gguf", *export_to]):
        result = psp(*arguments)
        assert result.exit_code == 1
        assert "mixture of experts" in result.output
        assert "--engine smallthinker" in result.output
