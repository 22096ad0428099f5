"""What `psp verify` makes of the numbers of files of arch `smallthinker`, and in which memory."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ModelMaker, refused
from exact_sums import ExactSums
from families import write
from gguf import GGMLQuantizationType as Kind
from mixtures import MIXTURES
from rewriting import recast, rewritten, stored, tensors_of

from architectures.model import load_model
from common.errors import SettingsError
from gguf_export.dense import export_single
from gguf_export.settings import ExportConfig
from gguf_files.pieces import pieces
from gguf_files.reader import GGUFFile
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.expert import ExpertEngine
from powerinfer_bridge.verify.settings import VerifyConfig
from powerinfer_bridge.verify.tensors import same_numbers, zeros_after
from powerinfer_bridge.verify.verification import verify

EXPERTS = "powerinfer_bridge.verify.experts"
GATE = "blk.0.ffn_gate_exps.weight"


def exported(model: Path, out: Path, outtype: str | None = None) -> Path:
    config = ExportConfig(model=str(model), engine="llama.cpp", out=out, outtype=outtype)
    return export_single(config).model_file


@pytest.fixture(scope="module")
def models(
    make_model: ModelMaker, tokenizer_bytes: bytes, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A model of one expert and one of several."""
    place = tmp_path_factory.mktemp("models")
    variant = next(variant for variant in MIXTURES if variant.name == "smallthinker-4b")
    several = write(replace(variant, files="safetensors"), place / "several", tokenizer_bytes)
    return {"one": make_model(place / "one"), "several": several.path}


@pytest.mark.parametrize("experts_of", ["one", "several"])
def test_a_bound_is_judged_whatever_the_weights_are(
    models: dict[str, Path], tmp_path: Path, experts_of: str
) -> None:
    model = models[experts_of]
    file = exported(model, tmp_path / "m.gguf")
    changed = recast(file, Kind.Q8_0, "blk.0.attn_q.")
    norm = 30 * GGUFFile(file).tensor("output_norm.weight")  # surer, and as often wrong
    changed |= {"output_norm.weight": stored(norm, Kind.F32)}
    wrong = rewritten(file, tmp_path / "wrong.gguf", tensors=changed)

    def judged(path: Path, bound: float | None) -> tuple[bool, str, float | None]:
        report = verify(path, str(model), max_ppl_gap=bound, context=32, chunks=2)
        found = report.checks["perplexity"]
        return found.ok, found.line, report.figures["ppl_gap"]

    ok, line, gap = judged(wrong, None)
    assert ok
    assert "not judged" in line
    assert gap is not None
    assert gap > 0.01
    ok, line, again = judged(wrong, 0.01)
    assert not ok
    assert "above 1.000%" in line
    assert again == gap
    ok, line, _ = judged(wrong, 2 * gap)
    assert ok
    assert "more" in line
    assert "not judged" not in line
    ok, line, _ = judged(file, 0.5)
    assert ok
    assert "apart and at most 50.000% more" in line


def test_a_bound_needs_the_model() -> None:
    with refused(SettingsError, "--max-ppl-gap", "pass --model"):
        VerifyConfig(file=Path("m.gguf"), max_ppl_gap=0.1)


def test_several_texts_have_the_logits_of_each(models: dict[str, Path], tmp_path: Path) -> None:
    """Weights are kept between texts, or read again: it is the same."""
    file = exported(models["one"], tmp_path / "m.gguf", "bf16")
    texts = [[1, 9, 30, 4, 77], [1, 5], [200, 3, 3]]
    for budget in (0, None):
        engine = ExpertEngine(file, budget=budget)
        layers = engine.hyper.n_layers
        with ExactSums():
            together = list(engine.forward_all(texts, [KVCache(layers) for _ in texts]))
            alone = [engine.forward(text, KVCache(layers)) for text in texts]
        for found, expected in zip(together, alone, strict=True):
            assert torch.equal(found, expected)
        assert engine.weights.resident == (budget is None)


def test_the_model_is_gone_before_the_file_runs(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []

    def remember(*args: Any, **settings: Any) -> Any:
        assert settings["weights"] == "streamed"
        model = load_model(*args, **settings)
        loaded.append(weakref.ref(model.causal_lm))
        return model

    def run(path: Path, **settings: Any) -> ExpertEngine:
        gc.collect()
        assert [model() for model in loaded] == [None]
        assert settings == {"budget": 0}
        return ExpertEngine(path, **settings)

    monkeypatch.setattr(f"{EXPERTS}.load_model", remember)
    monkeypatch.setattr(f"{EXPERTS}.ExpertEngine", run)
    file = exported(models["one"], tmp_path / "m.gguf")
    assert verify(file, str(models["one"]), context=32, chunks=2).ok


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0])
def test_pieces_are_the_tensor(models: dict[str, Path], tmp_path: Path, kind: Kind) -> None:
    file = exported(models["one"], tmp_path / "m.gguf")
    numbers = np.random.default_rng(1).standard_normal((1, 12, 64))
    held = GGUFFile(rewritten(file, tmp_path / "x.gguf", tensors={GATE: stored(numbers, kind)}))
    found = list(pieces(held, GATE, 96))
    assert [start for start, _ in found] == list(range(0, 768, 96))
    joined = np.concatenate([each for _, each in found])
    np.testing.assert_array_equal(joined, held.tensor(GATE).reshape(-1))


@pytest.fixture(scope="module")
def large(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    """A file with a matrix of 8 Mi numbers in Q8_0, all of them 0, as one of one expert."""
    place, shape = tmp_path_factory.mktemp("large"), (1, 8192, 1024)
    file = exported(models["one"], place / "m.gguf")
    content = bytes(34 * 8192 * 32)
    return GGUFFile(rewritten(file, place / "l.gguf", tensors={GATE: (shape, Kind.Q8_0, content)}))


def peak_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_large_matrix_is_looked_at_in_pieces(large: GGUFFile) -> None:
    """Neither check has as much in memory as the matrix has in float32, 32 MiB."""
    expected = torch.zeros(8192, 1024, dtype=torch.float16)
    results: list[bool] = []
    most = peak_of(lambda: results.append(same_numbers(large, GATE, expected)))
    assert results == [True]
    assert most < 24 << 20
    report = verify(large.path)
    assert "shape" in report.checks["shapes"].line
    assert report.checks["weights finite"].ok
    assert peak_of(lambda: verify(large.path)) < 24 << 20


def test_numbers_of_another_model_are_told_wherever_they_are(large: GGUFFile) -> None:
    for at in (0, 5_000_000, 8192 * 1024 - 1):
        expected = torch.zeros(8192 * 1024, dtype=torch.float16)
        expected[at] = 1
        assert not same_numbers(large, GATE, expected.reshape(8192, 1024))
    assert not same_numbers(large, GATE, torch.zeros(8193, 1024, dtype=torch.float16))
    assert same_numbers(large, GATE, torch.zeros(8000, 1024, dtype=torch.float16))
    assert zeros_after(large, GATE, 8000 * 1024)


def test_what_is_stored_beyond_the_model_is_told(models: dict[str, Path], tmp_path: Path) -> None:
    file = exported(models["one"], tmp_path / "m.gguf")
    shape = tensors_of(file)[GATE][0]
    numbers = np.zeros(shape, np.float32)
    numbers[0, -1, -1] = 1
    other = GGUFFile(
        rewritten(file, tmp_path / "x.gguf", tensors={GATE: stored(numbers, Kind.F16)})
    )
    assert zeros_after(other, GATE, numbers.size)
    assert not zeros_after(other, GATE, numbers.size - 1)
    assert not zeros_after(other, GATE, 64)
