"""`--predictors none`: a file that computes every neuron, and what each command says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from conftest import TEXT, make_export, refused

from common.errors import ExportError, PredictorError
from gguf_export.bundle import Bundle, export
from gguf_export.pwri.inspection import inspect_file, inspection_table
from gguf_export.pwri.schema import DENSE_THRESHOLD
from gguf_export.settings import ExportConfig
from gguf_files.reader import GGUFFile
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.verify.verification import verify

Psp = Callable[..., Result]


@pytest.fixture(scope="module")
def bundle(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("none") / "m.powerinfer.gguf"
    return make_export(model_dir, Path("none"), out)


def test_the_file_computes_every_neuron(bundle: Bundle, exact_bundle: Bundle) -> None:
    engine = Engine(bundle.model_file)
    tokens = [1, *engine.vocabulary.encode(TEXT)][:40]
    counts = engine.count()
    logits = engine.forward(tokens, KVCache(2))
    assert all(layer.predicted == layer.decisions for layer in counts)
    every = Engine(exact_bundle.model_file, threshold=DENSE_THRESHOLD)
    assert torch.equal(logits, every.forward(tokens, KVCache(2)))


def test_the_placeholders_are_as_small_as_powerinfer_takes_them(bundle: Bundle) -> None:
    file = GGUFFile(bundle.model_file)
    for layer in range(2):
        assert file.tensor(f"blk.{layer}.fc1.weight").shape == (32, 64)
        assert not file.tensor(f"blk.{layer}.fc2.weight").any()
    assert json.loads(file.values["psp.recipe"].data) == {"name": "none"}


def test_only_the_model_file_is_written(bundle: Bundle) -> None:
    written = {bundle.model_file, bundle.manifest}
    assert set(bundle.model_file.parent.iterdir()) == written
    assert list(bundle.outputs) == ["model_file", "manifest"]


def test_predictors_of_an_earlier_export_go(
    model_dir: Path, exact_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.powerinfer.gguf"
    before = make_export(model_dir, exact_dir, out)
    assert before.predictor_directory.is_dir()
    make_export(model_dir, Path("none"), out, force=True)
    assert set(tmp_path.iterdir()) == {out, before.manifest}


def test_verify_and_inspect_say_so(bundle: Bundle, exact_bundle: Bundle, model_dir: Path) -> None:
    report = verify(bundle.model_file, str(model_dir))
    assert report.ok
    assert report.checks["threshold"].detail == (
        "-1e+30: no neuron is skipped, as without predictors"
    )
    assert report.figures["ppl_gap"] == 0
    document = inspect_file(bundle.model_file)
    assert document["skips_neurons"] is False
    assert inspect_file(exact_bundle.model_file)["skips_neurons"] is True
    assert "32 in each of 2 layers; no neuron is skipped" in inspection_table(document)


def test_the_command_takes_the_word(psp: Psp, model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.powerinfer.gguf"
    result = psp("export-gguf", "--model", model_dir, "--predictors", "none", "--out", out)
    assert result.exit_code == 0, result.output
    assert "checks hold" in result.stdout


def test_a_split_needs_statistics(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.powerinfer.gguf"
    config = ExportConfig(
        model=str(model_dir), predictors=Path("none"), out=out, vram_budget="1GiB"
    )
    with refused(ExportError, "none: comes without activation statistics", "leave that out"):
        export(config)


def test_a_directory_of_that_name_is_meant_by_its_path(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with refused(PredictorError, "none/predictors.json"):
        make_export(model_dir, tmp_path / "none", tmp_path / "m.powerinfer.gguf")


@pytest.mark.powerinfer
def test_powerinfer_computes_every_neuron(
    powerinfer_bin: Path, bundle: Bundle, exact_bundle: Bundle
) -> None:
    programs, text = PowerInfer(powerinfer_bin), TEXT * 4
    found = programs.perplexity(bundle.model_file, text, 64, None, threads=1)
    every = programs.perplexity(
        exact_bundle.model_file, text, 64, None, threads=1, threshold=DENSE_THRESHOLD
    )
    assert found == every
