"""Which models become files for llama.cpp, and what is said of those that do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import TEXT, ModelMaker, refused
from families import BY_NAME, write
from gguf import GGUFValueType
from rewriting import rewritten
from safetensors.torch import load_file, save_file

from architectures.checkpoint import Checkpoint
from common.errors import CheckpointError, ExportError
from gguf_export.bundle import export
from gguf_export.dense import export_single
from gguf_export.settings import ExportConfig
from gguf_files.reader import GGUFFile
from powerinfer_bridge.engine.expert import ExpertEngine
from powerinfer_bridge.engine.perplexity import engine_perplexity
from powerinfer_bridge.programs.llama_cpp import LlamaCpp
from powerinfer_bridge.verify.verification import ExportCheck, verify

SIZES = {
    "wide heads": {"head_dim": 32},
    "narrow heads": {"head_dim": 8},
    "d_model of no blocks": {"hidden_size": 40, "intermediate_size": 72},
}


def single(model: Path, out: Path, outtype: str | None = None) -> Path:
    config = ExportConfig(model=str(model), engine="llama.cpp", out=out, outtype=outtype)
    return export_single(config, ExportCheck(str(model), out)).model_file


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)
def test_sizes_that_powerinfer_has_not_are_written(
    make_model: ModelMaker, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The file's own graph is compared with transformers' on the way."""
    model = make_model(tmp_path / "model", **changes)
    file = single(model, tmp_path / "m.gguf")
    report = verify(file, str(model), context=32, chunks=2)
    assert {name: c.line for name, c in report.checks.items() if not c.ok} == {}
    ours, theirs = (Checkpoint.open(path).shape for path in (file, model))
    assert ours.facts() == theirs.facts() | {"norm_eps": ours.norm_eps}
    again = single(file, tmp_path / "again.gguf")
    assert GGUFFile(again).values.keys() == GGUFFile(file).values.keys()


@pytest.mark.llama_cpp
@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)
def test_the_real_llama_cpp_computes_such_sizes(
    llama_cpp_bin: Path, make_model: ModelMaker, tmp_path: Path, changes: dict[str, Any]
) -> None:
    file = single(make_model(tmp_path / "model", **changes), tmp_path / "m.gguf")
    score = LlamaCpp(llama_cpp_bin, timeout=300).score(file, TEXT * 8, 64, 4, threads=1)
    if score is None:
        pytest.skip("this llama.cpp build has no llama-perplexity")
    expected = engine_perplexity(ExpertEngine(file), TEXT * 8, 64, 4, "engine")
    assert score.perplexity == pytest.approx(expected, 1e-3)


def test_powerinfer_s_files_have_heads_of_d_model_alone(
    make_model: ModelMaker, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", head_dim=32)
    out = tmp_path / "m.powerinfer.gguf"
    config = ExportConfig(model=str(model), predictors=Path("none"), out=out)
    with refused(ExportError, "4 heads of 32 numbers are not d_model 64", "--engine llama.cpp"):
        export(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 40}, "d_model 40 is no multiple of 32"),
        (
            {"head_dim": 12},
            "heads times head size 48 is no multiple of 32",
        ),
    ],
)
@pytest.mark.parametrize("outtype", ["q8_0", "q4_0"])
def test_rows_that_are_no_blocks_are_told_before_anything_is_written(
    make_model: ModelMaker, tmp_path: Path, changes: dict[str, Any], words: str, outtype: str
) -> None:
    model = make_model(tmp_path / "model", intermediate_size=64, **changes)
    with refused(ExportError, f"{words}, as {outtype} needs", "choose f16 or bf16"):
        single(model, tmp_path / "m.gguf", outtype)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_weight_beyond_float16_is_told_with_what_to_choose(
    make_model: ModelMaker, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", intermediate_size=64)
    file = model / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    with refused(ExportError, "largest magnitude 99840 does not fit float16", "--outtype bf16"):
        single(model, tmp_path / "m.gguf")
    assert single(model, tmp_path / "m.gguf", "bf16").exists()


def test_a_scaling_of_positions_names_both_engines(make_model: ModelMaker, tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = make_model(tmp_path / "model", rope_parameters={"rope_theta": 1e4, **scaling})
    with refused(CheckpointError, "rope_type is 'llama3'", "nor does llama.cpp in its ReLU graph"):
        single(model, tmp_path / "m.gguf")


@pytest.mark.parametrize("engine", ["llama.cpp", "powerinfer"])
def test_a_window_that_becomes_the_context_is_told(
    psp: Callable[..., Result], tokenizer_bytes: bytes, tmp_path: Path, engine: str
) -> None:
    variant = BY_NAME["relu-mistral"].changed(
        max_position_embeddings=512, sliding_window=64, intermediate_size=1024
    )
    model = write(variant, tmp_path / "model", tokenizer_bytes).path
    name, options = ("m.gguf", ()) if engine == "llama.cpp" else ("m.powerinfer.gguf", ("none",))
    command = ["export-gguf", "--engine", engine, "--model", model, "--out", tmp_path / name]
    result = psp(*command, *(word for value in options for word in ("--predictors", value)))
    assert result.exit_code == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "sliding window" in line]
    whose = "llama.cpp" if engine == "llama.cpp" else "PowerInfer"
    assert f"context is 64 tokens, the model's sliding window, which {whose} does not" in line


def test_a_model_without_a_window_is_told_nothing_of_one(
    psp: Callable[..., Result], model_dir: Path, tmp_path: Path
) -> None:
    command = ["export-gguf", "--engine", "llama.cpp", "--model", model_dir]
    assert "window" not in psp(*command, "--out", tmp_path / "m.gguf").stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ctx", 512], "--ctx is for PowerInfer's first engine, not for --engine llama.cpp"),
        (["--kv-type", "f16"], "--kv-type is for PowerInfer's first engine"),
        (["--dense-arch", "llama"], "--dense-arch is for PowerInfer's first engine"),
        (["--dense-type", "q8_0"], "not for --engine llama.cpp; pass --outtype q8_0"),
        (["--dense", "--dense-type", "bf16"], "--dense is for PowerInfer's first engine"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(
    psp: Callable[..., Result], model_dir: Path, tmp_path: Path, options: list[Any], words: str
) -> None:
    command = ["export-gguf", "--engine", "llama.cpp", "--model", model_dir]
    result = psp(*command, "--out", tmp_path / "m.gguf", *options)
    assert result.exit_code == 1
    assert words in result.stderr
    assert not (tmp_path / "m.gguf").exists()


WRONG = {
    "embedding_length": (np.uint32(66), "is 66, expected a multiple of twice the attention.head"),
    "attention.head_count_kv": (np.uint32(3), "head_count is 4, no multiple of attention.head_"),
    "attention.head_count": (np.uint32(0), "attention.head_count is 0"),
    "context_length": (np.uint32(0), "context_length is 0"),
    "attention.layer_norm_rms_epsilon": (np.float32("nan"), "epsilon is nan, expected 0 to 1"),
    "rope.freq_base": (np.float32("inf"), "rope.freq_base is inf, expected a number above 0"),
}


@pytest.mark.parametrize("key", WRONG)
def test_sizes_that_disagree_are_named(model_dir: Path, tmp_path: Path, key: str) -> None:
    value, words = WRONG[key]
    file = single(model_dir, tmp_path / "m.gguf")
    other = rewritten(file, tmp_path / "other.gguf", keys={f"smallthinker.{key}": value})
    line = verify(other).checks["keys"].line
    assert words in line
    assert "Hyperparameters" not in line


def test_a_head_s_size_is_told_where_it_does_not_follow(
    make_model: ModelMaker, model_dir: Path, tmp_path: Path
) -> None:
    keys = [f"smallthinker.attention.{name}_length" for name in ("key", "value")]
    wide = GGUFFile(single(make_model(tmp_path / "wide", head_dim=32), tmp_path / "w.gguf"))
    assert [wide.value(key, GGUFValueType.UINT32) for key in keys] == [32, 32]
    plain = GGUFFile(single(model_dir, tmp_path / "m.gguf"))
    assert not {*keys} & plain.values.keys()
    other = rewritten(wide.path, tmp_path / "other.gguf", keys={keys[1]: np.uint32(16)})
    assert "value_length is 16, the head size is 32" in verify(other).checks["keys"].line


def test_wide_heads_are_transformers_own(make_model: ModelMaker, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from architectures.model import load_model

    model = make_model(tmp_path / "model", head_dim=32)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
    found = load_model(Checkpoint.open(model), dtype=torch.float32, device="cpu").logits(ids)
    torch.testing.assert_close(found, expected)
