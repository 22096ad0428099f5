"""What PowerInfer's graphs for OPT and Falcon demand of a model, of its dense file and of VRAM."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TEXT, refused
from covering import write_covering
from families import BY_NAME, Variant, Written, save_tensors, write
from gguf import GGUFValueType
from published import opt_formula
from test_export_families import LOGIT_TOLERANCE, runnable, tokens_of, write_model

from architectures.falcon import FALCON_40B
from architectures.layouts import group_qkv
from common.errors import EngineError, ExportError
from gguf_export.bundle import Bundle, export
from gguf_export.pwri.memory_plan import BUCKET_BYTES, MemorySettings, plan_memory
from gguf_export.settings import ExportConfig
from gguf_files.reader import GGUFFile
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.engine import Engine, generate
from powerinfer_bridge.engine.perplexity import engine_perplexity
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.verify.verification import verify


def make(
    variant: Variant, path: Path, tokenizer_bytes: bytes, *, dense: bool = False
) -> tuple[Written, Bundle]:
    written = write(variant, path / "model", tokenizer_bytes)
    predictors = write_covering(written, path / "predictors", tokens_of(written, 60))
    return written, exported(written, predictors, dense=dense)


def exported(written: Written, predictors: Path, *, dense: bool = False) -> Bundle:
    out = predictors.parent / "out" / "m.powerinfer.gguf"
    config = ExportConfig(model=str(written.path), predictors=predictors, out=out, dense=dense)
    return export(config)


@pytest.fixture(scope="module")
def bundles(tokenizer_bytes: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """OPT with its dense file, and both layouts of Falcon."""
    found = {}
    for name in ("opt-6.7b", "falcon-7b", "falcon-40b"):
        path = tmp_path_factory.mktemp("graphs") / name
        path.mkdir()
        written, predictors = write_model(name, path / "model", tokenizer_bytes)
        found[name] = exported(written, predictors, dense=name == "opt-6.7b")
    return found


def test_fused_rows_are_sorted_by_what_they_are() -> None:
    """Rows of 6 heads in 2 groups, marked q0 to q5, k0, k1, v0, v1, in Falcon's order."""
    names = ["q0", "q1", "q2", "k0", "v0", "q3", "q4", "q5", "k1", "v1"]
    rows = [(head, dim) for head in range(len(names)) for dim in range(4)]
    weight = torch.tensor(rows)
    config = BY_NAME["falcon-40b"].changed(hidden_size=24, num_attention_heads=6).config
    shape = FALCON_40B.read_shape(config)
    found = [(names[head], dim) for head, dim in group_qkv(weight, shape).tolist()]
    order = sorted(names, key=lambda name: ("qkv".index(name[0]), name))
    assert found == [(name, dim) for name in order for dim in range(4)]


@pytest.mark.parametrize("context", [1024, 2050, 4096])
def test_an_opt_with_other_positions_than_powerinfer_s_is_refused(
    tokenizer_bytes: bytes, tmp_path: Path, context: int
) -> None:
    variant = runnable("opt-125m").changed(max_position_embeddings=context)
    with refused(ExportError, str(tmp_path), f"context of {context}", "exactly 2048 positions"):
        make(variant, tmp_path, tokenizer_bytes)


def test_an_opt_with_a_head_of_its_own_is_refused(tokenizer_bytes: bytes, tmp_path: Path) -> None:
    variant = runnable("opt-125m").changed(tie_word_embeddings=False)
    with refused(ExportError, str(tmp_path), "lm_head.weight is not tied", "embed_tokens"):
        make(variant, tmp_path, tokenizer_bytes)


@pytest.mark.parametrize("name", ["falcon-7b", "falcon-40b"])
def test_a_dense_falcon_is_refused(tokenizer_bytes: bytes, tmp_path: Path, name: str) -> None:
    with refused(ExportError, "--dense", "dense falcon file", "leave --dense out"):
        make(runnable(name), tmp_path, tokenizer_bytes, dense=True)
    assert not (tmp_path / "out").exists()


def test_tokens_beyond_the_learned_positions_are_refused(bundles: dict[str, Bundle]) -> None:
    """PowerInfer reads past the table there."""
    engine = Engine(bundles["opt-6.7b"].model_file)
    cache = KVCache(engine.hyper.n_layers)
    cache.length = 2047
    engine.forward([5], cache)
    with pytest.raises(EngineError, match="2048 positions"):
        engine.forward([5], cache)


def test_a_dense_opt_is_what_powerinfer_s_dense_loader_wants(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["opt-6.7b"]
    sparse, dense = GGUFFile(bundle.model_file), GGUFFile(bundle.dense_file)
    predictors = {name for name in sparse.tensors if ".fc" in name}
    renamed = {
        name.replace("ffn_down_t", "ffn_down") for name in sparse.tensors.keys() - predictors
    }
    assert dense.tensors.keys() == renamed
    assert {"blk.2.ffn_down.weight", "blk.2.ffn_down.bias"} < renamed
    assert dense.tensors["blk.0.ffn_down.weight"].shape == (64, 1012)
    for name in ("blk.1.ffn_up.bias", "position_embd.weight", "blk.1.attn_q.weight"):
        assert dense.tensor(name).tobytes() == sparse.tensor(name).tobytes()
    note = dense.value("psp.note", GGUFValueType.STRING)
    assert "PowerInfer computes ReLU" in note


ATTENTION = {
    "opt-6.7b": ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
    "falcon-7b": ("attn_norm", "attn_qkv", "attn_output"),
    "falcon-40b": ("attn_norm", "attn_norm_2", "attn_qkv", "attn_output"),
}
HEADS = {
    "opt-6.7b": ("output_norm.weight", "output_norm.bias"),
    "falcon-7b": ("output_norm.weight", "output_norm.bias", "output.weight"),
    "falcon-40b": ("output_norm.weight", "output_norm.bias", "output.weight"),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_vram_is_filled_in_the_loader_s_order(bundles: dict[str, Bundle], name: str) -> None:
    """As llm_load_sparse_model_tensors makes them: biases of the FFN stay on the CPU."""
    tensors = GGUFFile(bundles[name].model_file).tensors
    layers = range(BY_NAME[name].config["num_hidden_layers"])
    levels = (ATTENTION[name], ("fc1", "fc2"), ("ffn_norm",))
    expected = [
        found
        for stems in levels
        for layer in layers
        for stem in stems
        for part in ("weight", "bias")
        if (found := f"blk.{layer}.{stem}.{part}") in tensors
    ]
    expected += HEADS[name]
    settings = MemorySettings(budget=1 << 30, n_layers=len(layers), kv_width=64)
    plan = plan_memory(tensors.values(), settings)
    assert list(plan.offloaded) == expected
    assert plan.complete
    left = {found.split(".", 2)[-1] for found in tensors.keys() - set(expected)}
    biases = {"ffn_up.bias", "ffn_down_t.bias"} if name == "opt-6.7b" else set()
    outside = {"weight", "token_embd.weight", "position_embd.weight"}
    assert left - outside == {"ffn_up.weight", "ffn_down_t.weight"} | biases
    # Two rows of 64 float16 numbers, without gate and without biases.
    assert plan.bytes_per_neuron == (2 * 64 * 2 + BUCKET_BYTES,) * len(layers)


def small_residual(tokenizer_bytes: bytes, path: Path) -> tuple[Written, Bundle]:
    """Write an OPT whose first residual has a variance of about 2e-5, twice LayerNorm's epsilon."""
    written = write(runnable("opt-125m"), path / "model", tokenizer_bytes)
    for name, tensor in written.tensors.items():
        if "embed" in name:
            tensor *= 0.025
        if name.endswith("decoder.final_layer_norm.weight"):
            tensor *= 40
    (written.path / "pytorch_model.bin").unlink()
    save_tensors(written.tensors, written.path, written.variant.files)
    predictors = write_covering(written, path / "predictors", tokens_of(written, 60))
    return written, exported(written, predictors)


def test_an_opt_is_computed_without_epsilon(tokenizer_bytes: bytes, tmp_path: Path) -> None:
    """PowerInfer reads no epsilon for OPT: it shows in small residuals, and verify tells."""
    written, bundle = small_residual(tokenizer_bytes, tmp_path)
    tokens = tokens_of(written)
    engine = Engine(bundle.model_file, threshold=-1e30)
    ours = engine.forward(tokens, KVCache(engine.hyper.n_layers))
    without = replace(written.variant, formula=partial(opt_formula, eps=0.0))
    theirs = replace(written, variant=without).reference(tokens).logits.float()
    allowed = LOGIT_TOLERANCE * float(theirs.std())
    torch.testing.assert_close(ours, theirs, atol=allowed, rtol=0)
    model = written.reference(tokens).logits.float()
    assert float((model - theirs).abs().max()) > 5 * allowed
    document = verify(bundle.model_file, str(written.path)).document()
    assert [check["name"] for check in document["checks"] if not check["ok"]] == ["dense logits"]


@pytest.mark.powerinfer
def test_the_real_powerinfer_has_no_epsilon_for_opt(
    powerinfer_bin: Path, tokenizer_bytes: bytes, tmp_path: Path
) -> None:
    _, bundle = small_residual(tokenizer_bytes, tmp_path)
    real = PowerInfer(powerinfer_bin).perplexity(bundle.model_file, TEXT * 6, 32, None, threads=1)
    engine = Engine(bundle.model_file)
    assert engine_perplexity(engine, TEXT * 6, 32, None, "e") == pytest.approx(real, rel=5e-4)
    engine.hyper = replace(engine.hyper, norm_eps=1e-5)
    engine._operators.hyper = engine.hyper
    assert engine_perplexity(engine, TEXT * 6, 32, None, "e") != pytest.approx(real, rel=2e-3)


@pytest.mark.powerinfer
def test_the_real_powerinfer_runs_an_opt_densely_and_rightly(
    powerinfer_bin: Path, bundles: dict[str, Bundle]
) -> None:
    bundle, real = bundles["opt-6.7b"], PowerInfer(powerinfer_bin)
    dense, sparse = (
        real.perplexity(file, TEXT * 6, 32, None, threads=1)
        for file in (bundle.dense_file, bundle.model_file)
    )
    assert dense == pytest.approx(sparse, rel=1e-3)


@pytest.mark.powerinfer
@pytest.mark.parametrize("name", ATTENTION)
def test_the_real_text_is_the_embedded_engine_s(
    powerinfer_bin: Path, bundles: dict[str, Bundle], name: str
) -> None:
    """Token by token, which takes the path of single rows."""
    file = bundles[name].model_file
    run = PowerInfer(powerinfer_bin).generate(file, "def f(", 16, threads=1)
    assert run.text is not None
    assert generate(Engine(file), "def f(", 16).text in run.text
