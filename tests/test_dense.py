"""The dense file of PowerInfer's dense mode: the same weights in its layout, for timing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from conftest import TEXT, refused
from families import BY_NAME, write
from gguf import GGUFValueType

from common.errors import FormatError, OutputError
from gguf_export.bundle import Bundle, export
from gguf_export.settings import ExportConfig
from gguf_files.reader import GGUFFile
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.programs.powerinfer import PowerInfer

TRANSPOSED = "blk.{layer}.ffn_down_t.weight"


@pytest.fixture(scope="module")
def dense(model_dir: Path, exact_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("dense") / "m.powerinfer.gguf"
    return export(
        ExportConfig(
            model=str(model_dir), predictors=exact_dir, out=out, dense=True, dense_arch="llama"
        )
    )


def test_it_holds_the_same_weights_in_the_dense_layout(dense: Bundle) -> None:
    sparse, file = GGUFFile(dense.model_file), GGUFFile(dense.dense_file)
    assert dense.dense_file.name == "m.dense.gguf"
    assert (sparse.sparse, file.sparse) == (True, False)
    predictors = {f"blk.{layer}.{part}.weight" for layer in (0, 1) for part in ("fc1", "fc2")}
    renamed = {
        name.replace("ffn_down_t", "ffn_down") for name in sparse.tensors.keys() - predictors
    }
    assert file.tensors.keys() == renamed
    for name in file.tensors:
        if "ffn_down" in name:
            layer = name.split(".")[1]
            expected = sparse.tensor(TRANSPOSED.format(layer=layer)).T
        else:
            expected = sparse.tensor(name)
        assert file.tensor(name).shape == expected.shape
        assert file.tensor(name).tobytes() == expected.tobytes()


def test_its_keys_are_the_model_s_and_a_warning(dense: Bundle) -> None:
    sparse, file = GGUFFile(dense.model_file), GGUFFile(dense.dense_file)
    only = {"powerinfer.sparse_threshold", "psp.recipe", "psp.predictor_type"}
    assert file.values.keys() == (sparse.values.keys() - only) | {"psp.note"}
    for key in file.values.keys() & sparse.values.keys():
        assert repr(file.values[key]) == repr(sparse.values[key]), key
    note = file.value("psp.note", GGUFValueType.STRING)
    assert "SiLU" in note
    assert "wrong" in note


def test_the_embedded_engine_refuses_it(dense: Bundle) -> None:
    with refused(FormatError, str(dense.dense_file), "dense file", "powerinfer.gguf"):
        Engine(dense.dense_file)


def test_without_being_asked_for_it_is_not_written(exact_bundle: Bundle) -> None:
    assert not exact_bundle.dense_file.exists()


def test_it_is_replaced_only_by_force(model_dir: Path, exact_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.powerinfer.gguf"
    bundle = Bundle.beside(out)
    bundle.dense_file.write_text("old")

    def run(force: bool) -> Bundle:
        config = ExportConfig(
            model=str(model_dir), predictors=exact_dir, out=out, dense=True, force=force
        )
        return export(config)

    with refused(OutputError, str(bundle.dense_file), "--force"):
        run(force=False)
    assert bundle.dense_file.read_text() == "old"
    assert not out.exists()
    assert run(force=True).dense_file.read_bytes()[:4] == b"GGUF"


def test_the_command_names_it(
    psp: Callable[..., Result], model_dir: Path, exact_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.powerinfer.gguf"
    command = ("export-gguf", "--model", model_dir, "--predictors", exact_dir, "--out", out)
    assert "dense" not in psp(*command).stdout
    result = psp(*command, "--dense", "--force")
    assert str(tmp_path / "m.dense.gguf") in result.stdout


@pytest.mark.parametrize(
    ("name", "arch", "word"),
    [("bamboo", "auto", "dReLU"), ("prosparse", "llama", "SiLU"), ("prosparse", "auto", "FATReLU")],
)
def test_the_warning_fits_the_family(
    tokenizer_bytes: bytes, tmp_path: Path, name: str, arch: str, word: str
) -> None:
    from conftest import write_predictors

    variant = BY_NAME[name].changed(intermediate_size=1012)
    model = write(variant, tmp_path / name, tokenizer_bytes).path
    write_predictors(model, tmp_path / "p")
    out = tmp_path / "out" / "m.powerinfer.gguf"
    made = export(
        ExportConfig(
            model=str(model), predictors=tmp_path / "p", out=out, dense=True, dense_arch=arch
        )
    )
    note = GGUFFile(made.dense_file).value("psp.note", GGUFValueType.STRING)
    assert word in note


@pytest.mark.powerinfer
def test_the_real_powerinfer_runs_it_densely(powerinfer_bin: Path, dense: Bundle) -> None:
    """It loads and decodes; the SiLU of its dense graph makes another model of it."""
    run = PowerInfer(powerinfer_bin).generate(dense.dense_file, "def f(", 8, threads=1)
    assert run.decode.tokens == 7
    real = PowerInfer(powerinfer_bin)
    text = TEXT * 6
    as_silu = real.perplexity(dense.dense_file, text, 64, None, threads=1)
    as_relu = real.perplexity(dense.model_file, text, 64, None, threads=1)
    assert abs(as_silu / as_relu - 1) > 0.01
