"""What commands make of work that is spread over workers: the same as without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asked_tasks import settings_maker, write_tasks
from conftest import ModelMaker, refused
from workers_here import place_workers_here

from architectures.model import OutOfMemory
from common.errors import EngineError, SettingsError, TraceError
from evaluation.backends.transformers_model import TransformersBackend
from evaluation.run import evaluate
from gguf_export.bundle import Bundle
from gguf_files.reader import GGUFFile
from powerinfer_bridge.verify.nodes import compare_on_nodes
from powerinfer_bridge.verify.settings import VerifyConfig
from powerinfer_bridge.verify.verification import verify
from predictor.collection.collect import collect
from predictor.collection.nodes import cut
from predictor.collection.settings import CollectConfig
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig

HERE = "here"


@pytest.fixture
def _workers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    place_workers_here(monkeypatch)


def contents(place: Path) -> dict[str, bytes]:
    files = [file for file in place.rglob("*") if file.is_file()]
    return {str(file.relative_to(place)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def settings(
    make_model: ModelMaker, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> CollectConfig:
    place = tmp_path_factory.mktemp("spread")
    model = make_model(place / "model", intermediate_size=96, num_hidden_layers=4)
    return CollectConfig(
        model=str(model),
        data=str(data_file),
        out=place / "traces",
        tokens=900,
        context=64,
        shard_rows=200,
        importance_bits=8,
    )


@pytest.fixture(scope="module")
def traces(settings: CollectConfig) -> TraceStore:
    return collect(settings)


@pytest.mark.usefixtures("_workers_here")
@pytest.mark.parametrize("weights", ["resident", "streamed", "pipelined"])
@pytest.mark.parametrize("layers", [None, (1, 2)])
def test_traces(
    weights: str,
    layers: tuple[int, ...] | None,
    settings: CollectConfig,
    traces: TraceStore,
    tmp_path: Path,
) -> None:
    expected = settings.directory
    if layers is not None:
        expected = tmp_path / "alone"
        collect(replace(settings, out=expected, layers=layers))
    out, notes = tmp_path / "traces", list[str]()
    changed = replace(settings, out=out, layers=layers, weights=weights, ray=HERE)
    collect(changed, notes.append)
    assert contents(out) == contents(expected)
    stages = any(line.startswith("weights: in 3 stages") for line in notes)
    assert stages == (weights == "pipelined")


def test_stages_are_even_and_cover_all_blocks() -> None:
    assert cut(7, 3) == (range(0, 3), range(3, 5), range(5, 7))
    for blocks in range(1, 9):
        for stages in range(1, blocks + 1):
            ranges = cut(blocks, stages)
            assert [block for each in ranges for block in each] == list(range(blocks))
            assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_stages_need_several_workers(settings: CollectConfig) -> None:
    with refused(TraceError, "--weights pipelined", "--ray"):
        replace(settings, weights="pipelined")


@pytest.mark.usefixtures("_workers_here")
def test_predictors_and_their_gap(traces: TraceStore, tmp_path: Path) -> None:
    config = TrainConfig(traces=traces.path, out=tmp_path / "alone", max_ppl_gap=0.5)
    train_predictors(config)
    train_predictors(replace(config, out=tmp_path / "spread", ray=HERE))
    assert contents(tmp_path / "spread") == contents(tmp_path / "alone")


@pytest.mark.usefixtures("_workers_here")
def test_answers(
    model_dir: Path, exact_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.scoring.BOOTSTRAP", 20)
    make = settings_maker(model_dir, write_tasks(tmp_path / "tasks", count=4))
    config = make(predictors=(exact_dir,), output_path=tmp_path / "alone", batch_size=3)
    alone = evaluate(config)
    spread = evaluate(replace(config, output_path=tmp_path / "spread", ray=HERE))
    assert (spread.scores, spread.differences) == (alone.scores, alone.differences)
    assert [arm.sparsity for arm in spread.arms] == [arm.sparsity for arm in alone.arms]
    assert spread.unfinished == ()

    def no_memory(*args: Any) -> Any:
        raise OutOfMemory("cpu: out of memory", "pass less")

    with monkeypatch.context() as patched:
        for name in ("score", "generate"):
            patched.setattr(TransformersBackend, name, no_memory)
        notes: list[str] = []
        with refused(EngineError, "arm dense answered no task"):
            evaluate(replace(config, output_path=tmp_path / "none", ray=HERE), notes.append)
    assert any("out of memory for 3 requests; pass a smaller --batch-size" in n for n in notes)


@pytest.mark.usefixtures("_workers_here")
def test_a_file_beside_its_model(model_dir: Path, exact_bundle: Bundle, tmp_path: Path) -> None:
    config = VerifyConfig(file=exact_bundle.model_file, model=str(model_dir), ray=HERE)
    compare = compare_on_nodes(config, lambda line: None)
    alone = verify(config.file, config.model, run=False)
    spread = verify(config.file, config.model, run=False, compare=compare)
    assert spread.document() == alone.document()
    assert spread.ok
    tensors = GGUFFile(config.file).tensors
    damaged = tmp_path / "damaged.powerinfer.gguf"
    data = bytearray(config.file.read_bytes())
    data[tensors["blk.1.ffn_gate.weight"].start + 8] ^= 1
    damaged.write_bytes(data)
    found = verify(damaged, config.model, run=False, compare=compare).checks["model tensors"]
    assert not found.ok
    assert "blk.1.ffn_gate.weight differs" in found.line


def test_a_file_is_spread_only_beside_its_model() -> None:
    with refused(SettingsError, "--ray", "--model"):
        VerifyConfig(file=Path("a.powerinfer.gguf"), ray=HERE)
