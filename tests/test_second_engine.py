"""Files for PowerInfer's second engine: layout, sizes and types that it takes, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from conftest import ModelMaker, refused
from exact_sums import ExactSums
from families import BY_NAME, write
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType
from rewriting import Tensor, recast, rewritten, stored, tensors_of

from architectures.checkpoint import Checkpoint
from common.errors import ExportError, FormatError, OutputError
from gguf_export.contract import Report
from gguf_export.dense import export_single
from gguf_export.manifest import manifest_path
from gguf_export.settings import ExportConfig
from gguf_export.smallthinker.contract import ExpertFile, check_expert_structure
from gguf_export.smallthinker.file import write_one_expert
from gguf_export.smallthinker.second_engine import neuron_multiple, size_problem
from gguf_export.smallthinker.types import ExpertTypes
from gguf_export.tokens.model_vocabulary import read_vocabulary
from gguf_files.reader import GGUFFile
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.expert import ExpertEngine
from powerinfer_bridge.verify.verification import ExportCheck, verify

Psp = Callable[..., Result]


@pytest.fixture(scope="module")
def model(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("pages") / "model", intermediate_size=1024)


def exported(model: Path, out: Path, engine: str = "smallthinker", outtype: str = "q4_0") -> Path:
    config = ExportConfig(model=str(model), engine=engine, out=out, outtype=outtype)
    return export_single(config).model_file


@pytest.fixture(scope="module")
def file(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(model, tmp_path_factory.mktemp("second") / "m.smallthinker.gguf")


def test_down_matrices_are_turned_and_all_matrices_q4_0(file: Path, model: Path) -> None:
    found = GGUFFile(file)
    plain = GGUFFile(exported(model, file.with_name("plain.gguf"), "llama.cpp"))
    assert list(found.tensors) == list(plain.tensors)
    for name, info in found.tensors.items():
        router = ".ffn_gate_inp." in name
        vector = len(info.shape) == 1 or router
        assert info.kind is (Kind.F32 if vector else Kind.Q4_0), name
        turned = ".ffn_down_exps." in name
        expected = plain.tensors[name].shape
        assert info.shape == ((1, *expected[:0:-1]) if turned else expected), name


def test_turned_matrices_are_the_same_model(file: Path, model: Path) -> None:
    """In F16, which rounds no otherwise when rows become columns."""
    checkpoint = Checkpoint.open(str(model))
    vocabulary = read_vocabulary(model, checkpoint.shape.vocab_size, checkpoint.config)
    found, types = [], ExpertTypes(weights="f16")
    for turned in (True, False):
        path = file.with_name(f"{turned}.gguf")
        write_one_expert(checkpoint, vocabulary, types, path, path, transposed=turned)
        with ExactSums():
            found.append(ExpertEngine(path).forward(list(range(1, 20)), KVCache(2)))
    assert torch.equal(*found)


def test_every_check_holds(file: Path, model: Path) -> None:
    report = verify(file, str(model))
    assert not [name for name, outcome in report.checks.items() if not outcome.ok]
    assert "second engine" in report.checks["engine"].line


@pytest.mark.parametrize(
    ("d_model", "multiple"),
    [(4096, 16), (2048, 32), (2304, 256), (576, 1024), (512, 128), (64, 1024), (3072, 64)],
)
def test_matrices_fill_whole_pages(d_model: int, multiple: int) -> None:
    assert neuron_multiple(d_model) == multiple
    assert d_model // 32 * 18 * multiple % 4096 == 0
    assert d_model // 32 * 18 * (multiple - 1) % 4096
    assert multiple % 16 == 0


@pytest.mark.parametrize(
    ("d_model", "d_ff", "word"),
    [
        (4096, 11008, None),
        (2048, 5632, None),
        (5120, 13824, "4096"),
        (4100, 11008, "4096"),
        (2304, 5760, "256"),
        (576, 1536, "1024"),
        (2048, 2048, "square"),
    ],
)
def test_sizes_that_it_takes(d_model: int, d_ff: int, word: str | None) -> None:
    problem = size_problem(d_model, d_ff)
    assert (problem is None) if word is None else (problem is not None and word in problem)


def test_neurons_of_zeros_fill_the_pages(model_dir: Path, tmp_path: Path) -> None:
    """They are never active, so the model is the same; 1012 neurons are no whole pages here."""
    out = tmp_path / "m.smallthinker.gguf"
    config = ExportConfig(model=str(model_dir), out=out, engine="smallthinker")
    made = export_single(config, ExportCheck(str(model_dir), out))
    assert any("12 neurons of zeros are added" in line for line in made.warnings)
    file = GGUFFile(out)
    for stem in ("gate", "up", "down"):
        matrix = file.tensor(f"blk.1.ffn_{stem}_exps.weight")[0]
        assert matrix.shape == (1024, 64)
        assert matrix[:1012].any(axis=1).all()
        assert not matrix[1012:].any()
    assert file.value("smallthinker.feed_forward_length", GGUFValueType.UINT32) == 1024
    stray = file.tensor("blk.1.ffn_up_exps.weight").copy()
    stray[0, 1020, 3] = 1
    changes = {"blk.1.ffn_up_exps.weight": stored(stray, Kind.Q4_0)}
    other = rewritten(out, tmp_path / "o.gguf", tensors=changes)
    outcome = verify(other, str(model_dir), run=False).checks["model tensors"]
    assert "neurons that the model has not" in outcome.line


def test_a_size_that_it_does_not_take_is_refused(make_model: ModelMaker, tmp_path: Path) -> None:
    model = make_model(tmp_path / "square", hidden_size=64, intermediate_size=64)
    with refused(ExportError, "--engine smallthinker", "d_model"):
        exported(make_model(tmp_path / "wide", hidden_size=72), tmp_path / "w.smallthinker.gguf")
    assert exported(model, tmp_path / "m.smallthinker.gguf").exists()


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("bamboo", "dReLU"),
        ("opt-125m", "no gate"),
        ("falcon-7b", "no gate"),
        ("prosparse", "FATReLU"),
    ],
)
def test_other_graphs_are_refused(
    tokenizer_bytes: bytes, tmp_path: Path, name: str, word: str
) -> None:
    model = write(BY_NAME[name], tmp_path / name, tokenizer_bytes).path
    with refused(ExportError, "--engine smallthinker", word):
        exported(model, tmp_path / "m.smallthinker.gguf")


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_other_types_are_refused(outtype: str, tmp_path: Path) -> None:
    with refused(ExportError, f"--outtype {outtype}", "Q4_0", "q4_0"):
        ExportConfig(
            model="m",
            engine="smallthinker",
            out=tmp_path / "m.smallthinker.gguf",
            outtype=outtype,
        )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"predictors": Path("p")}, "--predictors"),
        ({"predictor_type": "f16"}, "--predictor-type"),
        ({"dense": True}, "--dense"),
        ({"vram_budget": "1GiB"}, "--vram-budget"),
    ],
)
def test_options_of_the_first_engine_are_refused(
    changes: dict[str, object], word: str, tmp_path: Path
) -> None:
    out = tmp_path / "m.smallthinker.gguf"
    with refused(ExportError, word, "first engine"):
        ExportConfig(model="m", engine="smallthinker", out=out, **changes)  # type: ignore[arg-type]


def test_a_name_without_its_suffix_is_refused(tmp_path: Path) -> None:
    with refused(ExportError, "m.gguf", ".smallthinker.gguf"):
        ExportConfig(model="m", engine="smallthinker", out=tmp_path / "m.gguf")


def test_what_is_there_is_replaced_only_by_force(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.smallthinker.gguf"
    out.write_text("old")
    with refused(OutputError, str(out), "--force"):
        exported(model, out)
    assert out.read_text() == "old"
    config = ExportConfig(model=str(model), engine="smallthinker", out=out, force=True)
    export_single(config, ExportCheck(str(model), out))
    assert out.read_bytes()[:4] == b"GGUF"
    assert set(tmp_path.iterdir()) == {out, manifest_path(out)}


def test_the_command_writes_verifies_and_inspects_it(psp: Psp, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.smallthinker.gguf"
    command = ("export-gguf", "--engine", "smallthinker", "--model", model, "--out", out)
    document = json.loads(psp(*command, "--json").stdout)
    assert document["model_file"] == str(out)
    assert document["verified"]["ok"] is True
    assert "second engine" in psp("verify", out).stdout
    assert "smallthinker" in psp("inspect", out).stdout
    again = psp(*command)
    assert again.exit_code == 1
    assert "--force" in again.stderr


def test_verify_finds_a_type_that_the_engine_stops_at(file: Path, tmp_path: Path) -> None:
    name = "blk.1.ffn_up_exps.weight"
    changed = rewritten(file, tmp_path / "f16.gguf", tensors=recast(file, Kind.F16, name))
    report = Report(changed)
    check_expert_structure(report, ExpertFile(changed), header_only=True)
    outcome = report.checks["engine"]
    assert not outcome.ok
    assert name in outcome.line
    assert "Q4_0" in outcome.line


def test_a_file_without_the_dimension_of_experts_is_the_same_model(
    file: Path, tmp_path: Path
) -> None:
    """As PowerInfer's and llama.cpp's `llama-quantize` write it."""
    flat = tmp_path / "flat.gguf"
    flattened: dict[str, Tensor | None] = {
        name: (shape[1:], kind, content)
        for name, (shape, kind, content) in tensors_of(file).items()
        if shape[0] == 1
    }
    assert len(flattened) == 8
    rewritten(file, flat, tensors=flattened)
    assert GGUFFile(flat).tensors["blk.0.ffn_up_exps.weight"].shape == (1024, 64)
    assert not [name for name, outcome in verify(flat).checks.items() if not outcome.ok]
    ids = [1, 5, 9]
    logits = [ExpertEngine(path).forward(ids, KVCache(2)) for path in (file, flat)]
    assert torch.equal(*logits)


def test_another_engine_s_command_says_what_it_is(file: Path) -> None:
    from powerinfer_bridge.engine.engine import Engine

    with refused(FormatError, str(file)):
        Engine(file)
