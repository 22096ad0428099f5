"""Layers that are not worth a predictor: chosen by the price, exported, proven, and as dense."""

from __future__ import annotations

import json
import operator
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import TEXT, ModelMaker, make_export, refused
from safetensors.torch import load_file, save_file
from test_operating_point import hand_made
from test_verification import changed, failures, fill
from test_weights import Content, put

from common.errors import PredictorError
from common.sealed import SEAL
from cost_model.model_bytes import Activity
from evaluation.arms import Arm, Arms
from gguf_export.bundle import Bundle, export
from gguf_export.gpu_split import _computed, choose_neurons
from gguf_export.pwri.dense_layers import check_dense_layers
from gguf_export.pwri.inspection import inspect_file, inspection_table
from gguf_export.pwri.statistics import read_statistics, statistics_file, write_saved
from gguf_export.settings import ExportConfig
from gguf_files.reader import GGUFFile
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.estimate.file import EstimatedFile
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.verify.verification import verify
from predictor.artifact import PredictorArtifact
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.dense_layer import least_predictor, least_size, worth_line
from predictor.module import decide, logits_of
from predictor.reporting.report import report_predictors
from predictor.thresholds.choose import price_for_gap
from predictor.thresholds.predicted_model import Quality
from predictor.thresholds.price import Layers, Priced, fewest_bytes
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig

CONSTANT = 1.8
"""First coordinate of every embedding, by which gates of layer 0 are mostly closed, of layer 1 all
open."""


@pytest.fixture(scope="module")
def model(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model(tmp_path_factory.mktemp("open") / "model")
    file = path / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(file).items()}
    weights["model.embed_tokens.weight"][:, 0] = CONSTANT
    for layer, gate in enumerate((-0.1, 1.0)):
        block = f"model.layers.{layer}."
        weights[block + "mlp.gate_proj.weight"][:, 0] = gate
        weights[block + "post_attention_layernorm.weight"].fill_(1)
        for name in ("mlp.down_proj.weight", "self_attn.o_proj.weight"):
            weights[block + name] *= 0.1
    save_file(weights, file, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def traces(model: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TraceStore:
    out = tmp_path_factory.mktemp("open") / "traces"
    sizes: dict[str, Any] = {"tokens": 1200, "context": 64, "importance_bits": 2}
    return collect(CollectConfig(model=str(model), data=str(data_file), out=out, **sizes))


@pytest.fixture(scope="module")
def config(traces: TraceStore, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    out = tmp_path_factory.mktemp("open") / "predictors"
    settings: dict[str, Any] = {"rank": 64, "recipe": "svd", "predictor_type": "q4_0"}
    return TrainConfig(traces=traces.path, out=out, max_ppl_gap=0.02, eval_tokens=256, **settings)


@pytest.fixture(scope="module")
def notes() -> list[str]:
    return []


@pytest.fixture(scope="module")
def artifact(config: TrainConfig, notes: list[str]) -> PredictorArtifact:
    """Predictors for thresholds above 0, the harder sign, of which layer 1 has none."""
    made = train_predictors(config, notes.append)
    assert made.header.threshold == 1
    return made


@pytest.fixture(scope="module")
def bundle(
    model: Path, artifact: PredictorArtifact, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    return make_export(model, artifact.path, tmp_path_factory.mktemp("open") / "m.powerinfer.gguf")


def below(config: TrainConfig, artifact: PredictorArtifact, tmp_path: Path) -> PredictorArtifact:
    """Return the same predictors with thresholds below 0, which more bytes lead to."""
    out = Path(shutil.copytree(artifact.path, tmp_path / "below"))
    changes: dict[str, Any] = {"max_ppl_gap": None, "ffn_bytes": 0.9, "resume": True}
    made = train_predictors(replace(config, out=out, **changes))
    assert made.header.threshold == -1
    return made


@pytest.mark.parametrize("kinds", [("f16",), ("q4_0", "f16")], ids=["f16", "q4_0"])
def test_the_least_predictor_lets_everything_through(kinds: tuple[str, ...]) -> None:
    size = least_size(kinds)
    assert (size.kind, size.rank) == {1: ("f16", 32), 2: ("q4_0", 64)}[len(kinds)]
    least = least_predictor(size, 128, 40, 7)
    predictor = least.predictor()
    assert least.shapes == ((size.rank, 128), (40, size.rank))
    assert least.activation_counts is not None
    assert least.activation_counts.tolist() == [7] * 40
    sizes = torch.logspace(-5, 4, 200)[:, None]
    inputs = torch.randn(200, 128, generator=torch.Generator().manual_seed(1)) * sizes
    single = torch.eye(128)[:9] * torch.logspace(-3, 4.8, 9)[:, None]
    assert decide(predictor, torch.cat([inputs, single, -single]), 1.0).all()
    nothing = torch.zeros(1, 128)
    assert (logits_of(predictor, nothing) == 0).all()
    assert decide(predictor, nothing, 0.0).all()
    # One of a million inputs that are as small as can be is no tie either.
    assert (logits_of(predictor, inputs[:100]) > 0).all()


def test_a_layer_is_dense_where_that_costs_less() -> None:
    """Its errors are then 0, and what its least predictor takes is counted."""
    always = replace(hand_made(), computed=torch.ones_like(hand_made().computed))
    layers = Layers({0: hand_made(), 1: always}, {0: 0.1, 1: 0.1}, 0.02)
    priced = layers.at(1e-4, 1)
    assert priced.points.keys() == {0}
    assert priced.dense == pytest.approx({1: 1.1})
    alone = Layers({0: hand_made()}, {0: 0.1}, 0.02)
    assert priced.error == alone.at(1e-4, 1).error
    assert priced.ffn_bytes_ratio == pytest.approx((1.02 + alone.at(1e-4, 1).ffn_bytes_ratio) / 2)
    # Where neurons cost nothing no error is worth it, though bytes would be saved.
    free = alone.at(1e-9, 1)
    assert 0 < free.dense[0] < 1
    assert (free.error, free.ffn_bytes_ratio) == (0, 1.02)
    assert not Layers({0: always}, {0: 0.1}).at(1e-4, 1).dense


def test_a_bound_is_used_though_typical_errors_leave_all_layers_dense() -> None:
    """What a layer misses shows a thousandth as much as is typical."""
    bad = replace(hand_made(), missed=torch.tensor([[0.5] * 2, [0.2] * 2, [0.3] * 2, [0.4] * 2]))
    measured: list[float] = []

    def measure(priced: Priced) -> Quality:
        measured.append(priced.error)
        growth = 1e-3 * priced.error
        return Quality(
            ppl_dense=1.0, ppl_sparse=1 + growth, kl_divergence=growth, standard_error=0.0
        )

    layers = Layers({0: bad}, {0: 0.1}, 0.02)
    assert fewest_bytes(layers, 0.02).dense
    found = price_for_gap(layers, 0.01, measure, measure)[0]
    assert not found.dense
    assert found.ffn_bytes_ratio == pytest.approx(0.15)
    assert len(measured) <= 6
    # Where even that is too much nothing is missed, and that is the end.
    strict = price_for_gap(layers, 1e-5, measure, measure)[0]
    assert (list(strict.dense), strict.error) == ([0], 0)


def test_the_layer_that_is_always_open_gets_none(
    artifact: PredictorArtifact, traces: TraceStore, notes: list[str]
) -> None:
    assert traces.activation_sparsity()[1] == 0
    read = PredictorArtifact.open(artifact.path)
    read.require_complete()
    assert read.dense == artifact.dense
    assert list(read.dense) == [1]
    assert read.dense[1] >= 1
    # Rank 64 in Q4_0 is a tenth of this little FFN, and no smaller predictor runs.
    assert read.layers[1]["ffn_bytes_ratio"] == pytest.approx(1.09968, abs=1e-4)
    assert read.layers[1]["ffn_output_error"] == 0
    assert read.layers[0]["ffn_bytes_ratio"] < 0.5
    assert read.rows()[1]["bytes_with_predictor"] == read.dense[1]
    assert notes[-1] == worth_line(read.ffn_bytes, read.dense)
    assert notes[-1].startswith("worth a predictor: 1 of 2 layers (0.")
    assert f"computed whole: 1 (1.100, with a predictor {read.dense[1]:.3f})" in notes[-1]
    least, trained = read.layer(1), read.layer(1, folded=False)
    assert (least.kind, least.rank) == ("q4_0", 64)
    assert not torch.equal(least.fc1, trained.fc1)
    assert least.activation_counts is not None
    assert set(least.activation_counts.tolist()) == {traces.rows}


def test_predictors_of_an_older_psp_have_no_dense_layers(
    artifact: PredictorArtifact, tmp_path: Path
) -> None:
    index = Path(shutil.copytree(artifact.path, tmp_path / "p")) / "predictors.json"
    document = json.loads(index.read_text())
    for key in ("dense", "tokens", SEAL):
        document.pop(key)
    index.write_text(json.dumps(document | {"schema_version": 5}))
    assert PredictorArtifact.open(index.parent).dense == {}


def test_all_that_is_told_of_them(
    artifact: PredictorArtifact,
    traces: TraceStore,
    bundle: Bundle,
    psp: Callable[..., Result],
    tmp_path: Path,
) -> None:
    report = report_predictors(tmp_path / "r", traces, artifact, draw=lambda out, report: None)
    assert report.worth == worth_line(artifact.ffn_bytes, artifact.dense)
    first, second = report.layers
    assert first.bytes_with_predictor is None
    assert second.bytes_with_predictor == artifact.dense[1]
    assert second.activation_recall == 1
    assert second.predicted_sparsity == 0
    assert second.ffn_bytes_ratio == pytest.approx(artifact.layers[1]["ffn_bytes_ratio"])
    told = json.loads(psp("inspect", artifact.path, "--json").stdout)
    assert told["facts"]["dense"] == {"1": artifact.dense[1]}
    stated = Activity(predicted=0.1, both=0.1, active=0.3)
    first_layer, dense = EstimatedFile(bundle.model_file).stated_activity(stated)
    assert (first_layer, dense.predicted, dense.both) == (stated, 1, 0.3)
    document = inspect_file(bundle.model_file)
    assert document["dense_layers"] == [1]
    assert "64 in each of 2 layers; computed whole: 1" in inspection_table(document)


def test_nothing_is_worth_a_predictor() -> None:
    told = worth_line({0: 1.1, 1: 1.1}, {0: 1.3, 1: 1.2})
    assert told.startswith("worth a predictor: 0 of 2 layers (allow more")
    assert told.endswith("computed whole: 0, 1 (1.100, with a predictor 1.200 to 1.300)")
    assert worth_line({0: 0.2, 1: 0.1}, {}) == (
        "worth a predictor: all 2 layers (0.100 to 0.200 of the FFN's bytes)"
    )


def test_another_bound_may_give_it_one_again(
    config: TrainConfig, artifact: PredictorArtifact, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(artifact.path, tmp_path / "p"))
    changes: dict[str, Any] = {"max_ppl_gap": None, "ffn_bytes": 0.25, "resume": True}
    again = train_predictors(replace(config, out=out, **changes))
    assert again.dense == {}
    trained = artifact.layer(1, folded=False)
    assert torch.equal(again.layer(1).fc1, trained.fc1)
    assert PredictorArtifact.open(out).rows()[1].keys() == again.rows()[0].keys()


def test_a_file_proves_that_every_neuron_is_computed(bundle: Bundle, model: Path) -> None:
    document = verify(bundle.model_file, str(model)).document()
    assert document["ok"], failures(document)
    (told,) = (c["detail"] for c in document["checks"] if c["name"] == "dense layers")
    assert told.startswith("every neuron of layer 1 is computed: residuals of root mean square ")
    engine = Engine(bundle.model_file)
    counts = engine.count()
    engine.forward([1, *engine.vocabulary.encode(TEXT)][:60], KVCache(2))
    assert counts[1].predicted == counts[1].decisions
    assert counts[0].predicted < 0.5 * counts[0].decisions


def test_a_file_whose_dense_layer_may_skip_is_not_verified(bundle: Bundle, tmp_path: Path) -> None:
    file = GGUFFile(bundle.model_file)
    fc1, fc2 = (file.tensor(f"blk.1.fc{n}.weight") for n in (1, 2))

    def numbers(name: str, change: np.ndarray[Any, Any]) -> Path:
        return changed(bundle, tmp_path, put(f"blk.1.{name}.weight", lambda old: change))

    faults: list[Callable[[], Path]] = [
        lambda: changed(bundle, tmp_path, fill("blk.1.fc2.weight", -1.0)),
        lambda: changed(bundle, tmp_path, fill("blk.1.fc1.weight", 0.5)),
        lambda: numbers("fc2", fc2 * 1e-5),
        lambda: numbers("fc1", fc1 * 0),
    ]
    for fault in faults:
        found = failures(verify(fault()).document())
        # Such a copy has its predictors in F32.
        assert set(found) == {"predictor types", "dense layers"}
        assert "layer 1 is said to be dense, but its predictor may skip" in found["dense layers"]


def test_thresholds_below_0_leave_no_doubt(
    config: TrainConfig, artifact: PredictorArtifact, model: Path, tmp_path: Path
) -> None:
    less = below(config, artifact, tmp_path)
    assert list(less.dense) == [1]
    made = make_export(model, less.path, tmp_path / "m.powerinfer.gguf")
    told = check_dense_layers(GGUFFile(made.model_file))
    assert told == (
        "every neuron of layer 1 is computed: logits are never below 0, the threshold is -1"
    )


def test_a_file_made_of_the_file_says_the_same(bundle: Bundle, model: Path, tmp_path: Path) -> None:
    again = export(
        ExportConfig(
            model=str(model), predictors=bundle.model_file, out=tmp_path / "again.powerinfer.gguf"
        )
    )
    assert GGUFFile(again.model_file).values["psp.dense_layers"].data == b"1"
    assert again.model_file.read_bytes() == bundle.model_file.read_bytes()


def test_its_neurons_come_first_on_a_gpu(bundle: Bundle, tmp_path: Path) -> None:
    """By statistics of others too, to which they are neurons like any."""
    counts = read_statistics(bundle.model_file.parent, 2, 1012)
    chosen = choose_neurons(counts, [10, 10], 10 * 1012)
    assert [float(each.double().mean()) for each in chosen] == [0, 1]
    for layer, often in enumerate((9, 3)):
        write_saved(statistics_file(tmp_path / "activation", layer), torch.full((1012,), often))
    found = _computed(GGUFFile(bundle.model_file), read_statistics(tmp_path, 2, 1012))
    assert [set(each.tolist()) for each in found] == [{9}, {9}]


def test_answers_are_the_models_where_all_layers_are_dense(
    artifact: PredictorArtifact, model: Path, tmp_path: Path
) -> None:
    made = PredictorArtifact.open(Path(shutil.copytree(artifact.path, tmp_path / "p")))
    made.dense[0] = 1.2
    made.write_header()
    arms = [
        Arm(name="dense", kind="dense", model=str(model)),
        Arm(name="p", kind="predictors", model=str(model), predictors=made.path),
    ]
    opened = Arms(arms, device="cpu", dtype="auto")
    logits = []
    for arm in arms:
        backend: Any = opened.open(arm)[0]
        with backend._model.arranged(backend._model.own, backend._placed):
            logits.append(backend._model.loaded.logits(torch.arange(60)[None]))
    assert torch.equal(*logits)


def test_a_model_without_a_zero_is_refused(
    model: Path, traces: TraceStore, data_file: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(traces.path, tmp_path / "t"))
    from recollected import recommit

    def change(file: Path, tensors: dict[str, torch.Tensor]) -> None:
        tensors["counts"].fill_(len(tensors["inputs"]))

    recommit(store, change)
    with refused(PredictorError, "every neuron of every layer", "psp sparsify"):
        train_predictors(TrainConfig(traces=store, out=tmp_path / "p", rank=32))


@pytest.mark.powerinfer
def test_powerinfer_computes_them_as_densely(
    powerinfer_bin: Path,
    config: TrainConfig,
    artifact: PredictorArtifact,
    bundle: Bundle,
    model: Path,
    tmp_path: Path,
) -> None:
    """Zeros under a threshold below 0 let everything through by PowerInfer's own rule."""
    programs, text = PowerInfer(powerinfer_bin), TEXT * 4

    def ppl(path: Path, **options: Any) -> float:
        return programs.perplexity(path, text, 64, None, threads=1, **options)

    made = make_export(
        model, below(config, artifact, tmp_path).path, tmp_path / "m.powerinfer.gguf"
    )
    # Both copies have their predictors in F32.
    found, zeros = (
        ppl(changed(made, tmp_path, put("blk.1.fc2.weight", partial(operator.mul, factor))))
        for factor in (1, 0)
    )
    assert found == zeros == pytest.approx(ppl(made.model_file), rel=1e-4)
    # With both layers' predictors the least, above 0 too: the model without predictors.
    content = Content.of(bundle.model_file)
    for part in ("fc1", "fc2"):
        content.tensors[f"blk.0.{part}.weight"] = content.tensors[f"blk.1.{part}.weight"]
    both = content.write(tmp_path / "both.powerinfer.gguf")
    every = ppl(both, threshold=-1e30)
    assert ppl(both) == ppl(both, threshold=0.0) == every
    without = make_export(model, Path("none"), tmp_path / "none.powerinfer.gguf").model_file
    assert ppl(without) == every
    assert ppl(bundle.model_file) != every
