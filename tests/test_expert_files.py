"""Files of arch `smallthinker` with one expert: the graph in which llama.cpp computes ReLU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizer_kinds
import torch
from click.testing import Result
from conftest import TEXT, ModelMaker, refused
from families import BY_NAME, VARIANTS, Variant, Written, write
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType
from rewriting import recast, rewritten, stored, tensors_of

from architectures.checkpoint import Checkpoint
from architectures.model import load_model
from common.errors import CheckpointError, ExportError, FormatError, PspError
from gguf_export.dense import export_single
from gguf_export.settings import ExportConfig
from gguf_files.reader import GGUFFile
from powerinfer_bridge.doctor.model_files import check_file
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.expert import ExpertEngine
from powerinfer_bridge.engine.perplexity import engine_perplexity
from powerinfer_bridge.programs.llama_cpp import LlamaCpp
from powerinfer_bridge.verify.verification import ExportCheck, verify

GATED = [v for v in VARIANTS if v.family in ("llama", "prosparse", "minicpm")]
OTHERS = ("bamboo", "opt-125m", "falcon-7b")
Export = Callable[..., Path]


@pytest.fixture(scope="module")
def written(
    tokenizer_bytes: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Variant], Written]:
    made: dict[str, Written] = {}

    def make(variant: Variant) -> Written:
        if variant.name not in made:
            path = tmp_path_factory.mktemp(variant.name) / "model"
            made[variant.name] = write(variant, path, tokenizer_bytes)
        return made[variant.name]

    return make


@pytest.fixture(scope="module")
def block_model(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sizes go into blocks."""
    return make_model(tmp_path_factory.mktemp("blocks") / "model", intermediate_size=1024)


@pytest.fixture
def export(tmp_path: Path) -> Export:
    def run(model: object, outtype: str | None = None, name: str = "m.gguf") -> Path:
        config = ExportConfig(
            model=str(model), engine="llama.cpp", out=tmp_path / name, outtype=outtype
        )
        return export_single(config).model_file

    return run


@pytest.mark.parametrize("variant", GATED, ids=lambda variant: variant.name)
def test_its_graph_gives_the_model_s_logits(
    variant: Variant, written: Callable[[Variant], Written], export: Export
) -> None:
    """The file's own graph against the published formula; FATReLU's shift is not in it."""
    made = written(variant)
    config = {**variant.config, "hidden_act": "relu"}
    file = export(made.path)
    ids = torch.arange(1, 12) % variant.config["vocab_size"]
    tensors = {name: tensor.float() for name, tensor in made.tensors.items()}
    expected = variant.formula(config, tensors, ids).logits
    found = ExpertEngine(file).forward(ids.tolist(), KVCache(variant.config["num_hidden_layers"]))
    assert (found - expected).abs().max() <= 0.02 * expected.std()


@pytest.mark.parametrize("variant", GATED, ids=lambda variant: variant.name)
def test_every_check_holds_with_its_model(
    variant: Variant, written: Callable[[Variant], Written], export: Export
) -> None:
    made = written(variant)
    report = verify(export(made.path), str(made.path), context=16, chunks=2)
    assert {name: c.line for name, c in report.checks.items() if not c.ok} == {}
    assert report.figures["ppl_dense"] == pytest.approx(report.figures["ppl_transformers"], 1e-3)


@pytest.mark.parametrize("variant", GATED, ids=lambda variant: variant.name)
def test_read_as_a_model_it_is_the_model(
    variant: Variant, written: Callable[[Variant], Written], export: Export
) -> None:
    made = written(variant)
    ours, theirs = (Checkpoint.open(str(path)) for path in (export(made.path), made.path))
    assert ours.fingerprint == theirs.fingerprint
    assert ours.shape.activation == theirs.shape.activation
    assert ours.shape.activation_threshold == pytest.approx(theirs.shape.activation_threshold)
    ids = torch.arange(1, 12)[None] % theirs.shape.vocab_size
    logits = [
        load_model(each, dtype=torch.float32, device="cpu").logits(ids) for each in (ours, theirs)
    ]
    # A gate at FATReLU's threshold may fall on its other side when weights become float16.
    torch.testing.assert_close(logits[0], logits[1], rtol=5e-3, atol=5e-2)


def test_it_holds_one_expert_and_rows_as_hugging_face_has_them(
    written: Callable[[Variant], Written], export: Export
) -> None:
    made = written(BY_NAME["relu-llama"])
    file = GGUFFile(export(made.path))
    shape = Checkpoint.open(str(made.path)).shape
    names = {
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
        "blk.1.attn_k.weight": "model.layers.1.self_attn.k_proj.weight",
        "blk.1.ffn_down_exps.weight": "model.layers.1.mlp.down_proj.weight",
        "blk.1.ffn_gate_exps.weight": "model.layers.1.mlp.gate_proj.weight",
        "blk.1.ffn_up_exps.weight": "model.layers.1.mlp.up_proj.weight",
    }
    for name, source in names.items():
        expected = made.tensors[source].half().numpy()
        found = file.tensor(name)
        assert found.shape == ((1, *expected.shape) if "exps" in name else expected.shape)
        assert found.tobytes() == expected.tobytes()
    router = file.tensor("blk.1.ffn_gate_inp.weight")
    assert (router.shape, router.dtype, router.any()) == ((1, shape.d_model), np.float32, False)
    sizes = {"expert_count": 1, "expert_used_count": 1, "expert_feed_forward_length": shape.d_ff}
    for key, value in sizes.items():
        assert file.value(f"smallthinker.{key}", GGUFValueType.UINT32) == value
    assert "smallthinker.attention.sliding_window" not in file.values
    assert "psp.note" not in file.values


def test_a_shifted_activation_is_told(
    psp: Callable[..., Result], written: Callable[[Variant], Written], tmp_path: Path
) -> None:
    model = written(BY_NAME["prosparse"]).path
    out = tmp_path / "m.gguf"
    told = psp("export-gguf", "--engine", "llama.cpp", "--model", model, "--out", out).stderr
    assert "warning: arch smallthinker computes ReLU: gates between 0 and 0.2" in told
    note = GGUFFile(out).value("psp.note", GGUFValueType.STRING)
    assert "FATReLU" in note


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_another_graph_is_refused(
    written: Callable[[Variant], Written], export: Export, name: str
) -> None:
    model = written(BY_NAME[name]).path
    with refused(ExportError, "--engine llama.cpp: a ", "is none of arch smallthinker, because"):
        export(model)


@pytest.mark.parametrize(("outtype", "kind"), [("bf16", Kind.BF16), ("q8_0", Kind.Q8_0)])
def test_types_that_powerinfer_lacks_are_rounded_from_the_model_s_own(
    block_model: Path, export: Export, outtype: str, kind: Kind
) -> None:
    file = export(block_model, outtype)
    up = Checkpoint.open(str(block_model))
    rule = up.architecture.rule("mlp.up_proj.weight")
    numbers = up.read(rule, 0).float().numpy()
    assert tensors_of(file)["blk.0.ffn_up_exps.weight"][1:] == stored(numbers, kind)[1:]
    assert GGUFFile(file).tensors["output.weight"].kind is kind
    assert verify(file, str(block_model), run=False).ok


def test_in_four_bits_the_head_stays_as_it_is(block_model: Path, export: Export) -> None:
    kinds = {n: i.kind for n, i in GGUFFile(export(block_model, "q4_0")).tensors.items()}
    assert kinds["output.weight"] is Kind.F16
    assert kinds["blk.0.ffn_down_exps.weight"] is kinds["token_embd.weight"] is Kind.Q4_0


def test_sizes_that_are_no_blocks_are_refused(
    tokenizer_bytes: bytes, export: Export, tmp_path: Path
) -> None:
    variant = BY_NAME["relu-llama"].changed(intermediate_size=200)
    model = write(variant, tmp_path / "model", tokenizer_bytes).path
    with refused(ExportError, "d_ff 200 is no multiple of 32, as q8_0 needs", "f16 or bf16"):
        export(model, "q8_0")
    assert export(model).exists()


def test_what_a_gguf_model_stores_is_copied_rows_in_their_order(
    block_model: Path, export: Export, tmp_path: Path
) -> None:
    """Of arch llama queries are stored with their rows permuted, which blocks do not mind."""
    config = ExportConfig(model=str(block_model), engine="llama.cpp", out=tmp_path / "plain.gguf")
    plain = export_single(config).model_file
    changes = recast(plain, Kind.Q5_0, "attn_q", "ffn_up", "ffn_down")
    file = rewritten(plain, tmp_path / "q5.gguf", tensors=changes)
    again = export(file)
    assert tensors_of(again) == tensors_of(file)
    more = GGUFFile(again).values.keys() - GGUFFile(file).values.keys()
    assert more == {"general.quantization_version"}
    rounded = tensors_of(export(file, "f16", "f16.gguf"))
    assert rounded["blk.0.attn_q.weight"][1] is Kind.F16


def test_a_type_of_which_there_is_no_file_type_is_copied(
    make_model: ModelMaker, export: Export, tmp_path: Path
) -> None:
    """There is a file type Q4_K_M and one Q4_K_S, and none Q4_K."""
    model = make_model(tmp_path / "model", hidden_size=256, intermediate_size=256)
    plain, names = export(model), [f"blk.{n}.ffn_up_exps.weight" for n in (0, 1)]
    tensors = {name: ((1, 256, 256), Kind.Q4_K, bytes(144 * 256)) for name in names}
    source = rewritten(plain, tmp_path / "q4k.gguf", tensors=tensors)
    made = GGUFFile(export(source, None, "again.gguf"))
    assert {made.tensors[name].kind for name in names} == {Kind.Q4_K}


def test_a_sparse_file_becomes_the_one_of_its_checkpoint(
    exact_bundle: Any, model_dir: Path, export: Export
) -> None:
    ours, theirs = export(exact_bundle.model_file), export(model_dir, "f16", "other.gguf")
    assert tensors_of(ours) == tensors_of(theirs)


def altered(path: Path, out: Path, name: str, change: Callable[[Any], Any]) -> Path:
    numbers = change(GGUFFile(path).tensor(name).copy())
    kind = GGUFFile(path).tensors[name].kind
    return rewritten(path, out, tensors={name: stored(numbers, kind)})


def wrongs() -> Iterator[Any]:
    swap = lambda q: q[[1, 0, *range(2, len(q))]]  # noqa: E731
    nan = lambda n: np.where(np.arange(n.size).reshape(n.shape) == 3, np.nan, n)  # noqa: E731
    yield "blk.0.attn_q.weight", swap, "model tensors", "differs from the model's"
    yield "blk.1.ffn_down_exps.weight", np.negative, "model tensors", "ffn_down_exps"
    yield "blk.1.ffn_norm.weight", nan, "norms finite", "NaN"
    yield "output.weight", nan, "weights finite", "NaN"


@pytest.mark.parametrize(("name", "change", "check", "words"), list(wrongs()))
def test_other_numbers_are_found(
    model_dir: Path, export: Export, tmp_path: Path, name: str, change: Any, check: str, words: str
) -> None:
    file = altered(export(model_dir), tmp_path / "other.gguf", name, change)
    outcome = verify(file, str(model_dir), run=False).checks[check]
    assert not outcome.ok
    assert words in outcome.line


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"smallthinker.expert_count": np.uint32(2)}, "its keys imply (2, 64)"),
        ({"smallthinker.expert_feed_forward_length": np.uint32(96)}, "feed_forward_length is"),
        ({"smallthinker.rope.dimension_count": np.uint32(8)}, "not the head size 16"),
    ],
)
def test_keys_of_another_graph_are_found(
    model_dir: Path, export: Export, tmp_path: Path, keys: Any, words: str
) -> None:
    file = rewritten(export(model_dir), tmp_path / "other.gguf", keys=keys)
    report = verify(file)
    assert not report.checks["keys"].ok
    assert words in report.checks["keys"].line
    with pytest.raises(PspError):
        Checkpoint.open(str(file))


def test_a_window_takes_positions_away(model_dir: Path, export: Export, tmp_path: Path) -> None:
    sizes = {"smallthinker.attention.sliding_window": 64}
    file = rewritten(export(model_dir), tmp_path / "other.gguf", sizes=sizes)
    assert "positions of some layers" in verify(file).checks["keys"].line
    with refused(CheckpointError, "takes the positions of some layers away"):
        Checkpoint.open(str(file))


def test_what_llama_cpp_would_stop_at_is_found(
    model_dir: Path, export: Export, tmp_path: Path
) -> None:
    file, key = export(model_dir), "smallthinker.expert_gating_func"
    other = rewritten(file, tmp_path / "gating.gguf", keys={key: np.uint32(9)})
    assert "is 9, expected 1 or 2" in verify(other).checks["keys"].line
    sizes = {"smallthinker.attention.key_length": 32}
    other = rewritten(file, tmp_path / "length.gguf", sizes=sizes)
    assert "value_length is 16, the head size is 32" in verify(other).checks["keys"].line
    flat = (1012 * 64,), Kind.F16, bytes(2 * 1012 * 64)
    changes = {f"blk.0.ffn_{stem}_exps.weight": flat for stem in ("up", "down")}
    other = rewritten(file, tmp_path / "flat.gguf", tensors=changes)
    assert "expected (1, 1012, 64)" in verify(other).checks["shapes"].line


def test_several_experts_are_no_model_of_one(
    model_dir: Path, export: Export, tmp_path: Path
) -> None:
    keys = {"smallthinker.expert_count": np.uint32(8)}
    file = rewritten(export(model_dir), tmp_path / "other.gguf", keys=keys)
    with refused(CheckpointError, "a mixture of experts", "psp sparsity"):
        Checkpoint.open(str(file))


def test_a_file_that_fails_its_checks_is_not_kept(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf_export.smallthinker import plan

    monkeypatch.setattr(plan, "_router", lambda layer, model: plan_nan(layer, model.d_model))
    config = ExportConfig(model=str(model_dir), engine="llama.cpp", out=tmp_path / "m.gguf")
    with refused(ExportError, "failed verification at 'weights finite'"):
        export_single(config, ExportCheck(str(model_dir), config.out))
    assert not list(tmp_path.iterdir())


def plan_nan(layer: int, d_model: int) -> Any:
    from gguf_export.plan import PlannedTensor

    numbers = torch.full((1, d_model), torch.nan)
    return PlannedTensor(
        f"blk.{layer}.ffn_gate_inp.weight", (1, d_model), Kind.F32, lambda: numbers
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [("--predictors", "none"), ("--vram-budget", "1GiB"), ("--predictor-type", "f16")],
)
def test_options_for_powerinfer_are_refused(
    psp: Callable[..., Result], model_dir: Path, tmp_path: Path, option: str, value: str
) -> None:
    command = ["export-gguf", "--engine", "llama.cpp", "--model", model_dir]
    result = psp(*command, "--out", tmp_path / "m.gguf", option, value)
    assert result.exit_code != 0
    assert f"{option} is for PowerInfer" in result.stderr


def test_names_are_not_mixed_up(
    psp: Callable[..., Result], model_dir: Path, exact_dir: Path, tmp_path: Path
) -> None:
    command = ["export-gguf", "--model", model_dir]
    mixed = psp(*command, "--engine", "llama.cpp", "--out", tmp_path / "m.powerinfer.gguf")
    assert "the name *.powerinfer.gguf is for PowerInfer" in mixed.stderr
    options = ["--predictors", exact_dir, "--out", tmp_path / "m.powerinfer.gguf"]
    lonely = psp(*command, *options, "--dense-type", "q8_0")
    assert "are for --dense; pass --dense" in lonely.stderr
    neither = psp(*command, "--out", tmp_path / "m.powerinfer.gguf")
    assert "Missing option '--predictors'" in neither.stderr


def test_the_command_writes_both_and_checks_both(
    psp: Callable[..., Result], block_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.powerinfer.gguf"
    command = ["export-gguf", "--model", block_model, "--predictors", "none", "--out", out]
    result = psp(*command, "--dense", "--dense-type", "q8_0", "--json")
    document = json.loads(result.stdout)
    assert document["dense_verified"]["ok"]
    assert document["dense_verified"]["file"] == document["dense_file"]
    file = GGUFFile(Path(document["dense_file"]))
    assert file.value("general.architecture", GGUFValueType.STRING) == "smallthinker"
    assert file.tensors["blk.0.ffn_up_exps.weight"].kind is Kind.Q8_0
    shown = psp(*command, "--dense", "--force").stdout
    assert "dense verified         16 checks hold" in shown


@pytest.mark.parametrize("command", ["inspect", "doctor", "verify"])
def test_the_commands_know_it(
    psp: Callable[..., Result], model_dir: Path, export: Export, command: str
) -> None:
    shown = " ".join(psp(command, export(model_dir)).stdout.split())
    words = {
        "inspect": "1 a layer, ReLU after the gate",
        "doctor": "llama.cpp's arch smallthinker: one expert, ReLU after its gate",
        "verify": "all checks hold",
    }
    assert words[command] in shown


def test_the_first_engine_s_commands_say_whose_it_is(
    psp: Callable[..., Result], model_dir: Path, export: Export
) -> None:
    shown = psp("bench-powerinfer", export(model_dir)).stderr
    assert "a file of arch smallthinker, for other engines; pass a *.powerinfer.gguf" in shown
    assert len(shown.strip().splitlines()) == 1


def test_a_damaged_file_is_a_finding(model_dir: Path, export: Export, tmp_path: Path) -> None:
    file = rewritten(
        export(model_dir), tmp_path / "o.gguf", tensors={"blk.0.ffn_up_exps.weight": None}
    )
    (finding,) = check_file(file, ())
    assert "ffn_up_exps.weight: missing" in str(finding)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:100])
    assert not verify(cut).checks["file"].ok
    with pytest.raises(FormatError):
        ExpertEngine(cut)


def strange(document: dict[str, Any]) -> None:
    split = {"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split, document["pre_tokenizer"]],
    }


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("GPT-2", "gpt-2"),
        ("Falcon", "falcon"),
        ("Llama-3", "llama-bpe"),
        ("Qwen2", "qwen2"),
        ("strange", None),
    ],
)
def test_llama_cpp_is_told_how_texts_are_split(
    model_dir: Path, tmp_path: Path, kind: str, name: str | None
) -> None:
    model, rows = tmp_path / "model", Checkpoint.open(str(model_dir)).shape.vocab_size
    shutil.copytree(model_dir, model, ignore=shutil.ignore_patterns("tokenizer*"))
    tokenizer_kinds.byte_level(
        model, "GPT-2" if kind == "strange" else kind, ["<s>", "</s>"], size=rows
    )
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    if kind == "strange":
        tokenizer_kinds.change(model, strange)
    config = ExportConfig(model=str(model), engine="llama.cpp", out=tmp_path / "m.gguf")
    made = export_single(config, ExportCheck(str(model), config.out))
    file = GGUFFile(made.model_file)
    assert file.optional("tokenizer.ggml.pre", GGUFValueType.STRING, None) == name
    told = [line for line in made.warnings if "llama.cpp has no name" in line]
    assert bool(told) is (name is None)


def test_its_chat_template_is_the_model_s(model_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    config = ExportConfig(model=str(model), engine="llama.cpp", out=tmp_path / "m.gguf")
    file = GGUFFile(export_single(config).model_file)
    assert file.value("tokenizer.chat_template", GGUFValueType.STRING) == "{{ messages }}"


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    "name", ["relu-llama", "llama-tied", "llama-linear", "llama-yarn", "minicpm"]
)
def test_the_real_llama_cpp_scales_positions_and_folds_factors(
    llama_cpp_bin: Path, written: Callable[[Variant], Written], export: Export, name: str
) -> None:
    model, text = written(BY_NAME[name]).path, TEXT * 8
    score = LlamaCpp(llama_cpp_bin, timeout=300).score(export(model), text, 64, 4, threads=1)
    if score is None:
        pytest.skip("this llama.cpp build has no llama-perplexity")
    report = verify(export(model, None, "again.gguf"), str(model), context=64, chunks=4)
    expected = engine_perplexity(ExpertEngine(report.path), text, 64, 4, "engine")
    assert score.perplexity == pytest.approx(expected, 1e-3)
    assert report.ok


@pytest.mark.llama_cpp
@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0", "q4_0"])
def test_the_real_llama_cpp_computes_what_the_graph_does(
    llama_cpp_bin: Path, block_model: Path, export: Export, outtype: str
) -> None:
    file, text = export(block_model, outtype), TEXT * 8
    score = LlamaCpp(llama_cpp_bin, timeout=300).score(file, text, 64, 4, threads=1)
    if score is None:
        pytest.skip("this llama.cpp build has no llama-perplexity")
    expected = engine_perplexity(ExpertEngine(file), text, 64, 4, "engine")
    assert score.perplexity == pytest.approx(expected, 3e-3)
