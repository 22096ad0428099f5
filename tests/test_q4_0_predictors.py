"""Predictors in Q4_0: what rounding costs, how it is made good, and that an export follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ModelMaker, refused
from planted import TRAIN, planted_layer, seeded
from torch.nn.functional import linear

from architectures.checkpoint import Checkpoint
from architectures.rounded import own_type, rounded
from common.errors import ExportError, PredictorError
from common.rounding import to_q4_0, to_q8_0, unpack_q4_0
from gguf_export.bundle import export
from gguf_export.settings import ExportConfig
from gguf_files.names import PREDICTOR_TYPE_KEY
from gguf_files.reader import GGUFFile
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.verify.verification import verify
from predictor.artifact import PredictorArtifact
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.feedback import by_itself, damped, feedback_of, with_feedback
from predictor.module import Predictor, logits_of
from predictor.size import Size
from predictor.traces.rows import LabelledRows
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import SVD, TrainConfig, possible_sizes
from predictor.training.start import Starter, start_sample
from predictor.training.storing import in_q4_0


def test_feedback_keeps_products_where_numbers_come_together() -> None:
    """Inputs with one strong direction: rounding each number by itself misses it everywhere."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 64, generator=generator) * 0.3 + 5
    weights = torch.randn(50, 64, generator=generator)
    feedback = feedback_of(damped(inputs.T @ inputs / len(inputs), 1e-4))
    exact = inputs @ weights.T
    errors = [
        float((inputs @ unpack_q4_0(stored).T - exact).square().mean())
        for stored in (
            by_itself(weights),
            with_feedback(weights, feedback),
        )
    ]
    assert errors[1] < errors[0] / 30


def test_numbers_by_themselves_are_no_further_off_than_ggmls() -> None:
    weights = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        float((numbers - weights).square().mean())
        for numbers in (unpack_q4_0(by_itself(weights)), to_q4_0(weights))
    )
    assert 0.5 * theirs < ours < theirs
    assert not unpack_q4_0(by_itself(torch.zeros(2, 32))).any()


def test_logits_are_those_of_8_bit_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    fc1, fc2 = (torch.randn(*shape, generator=generator) for shape in ((64, 64), (70, 64)))
    x = torch.randn(9, 64, generator=generator)
    predictor = Predictor(to_q4_0(fc1), to_q4_0(fc2), "q4_0")
    hidden = linear(to_q8_0(x), predictor.fc1).relu()
    assert torch.equal(logits_of(predictor, x), linear(to_q8_0(hidden), predictor.fc2))
    assert not torch.equal(logits_of(Predictor(fc1, fc2), x), logits_of(predictor, x))
    assert predictor.on(torch.device("cpu")).kind == "q4_0"


def test_the_constant_survives_in_two_units() -> None:
    """Logits of a start with a constant, stored with feedback, by themselves, and in float."""
    rows, weights = planted_layer(5.0)
    labelled = LabelledRows(rows, weights, normalise=True)
    starter = Starter(SVD, labelled, start_sample(SVD, TRAIN, seeded()))
    start = starter.at(Size("q4_0", 64), seeded())
    assert start.coordinates is not None
    trained, inputs = start.plain(), labelled.inputs(TRAIN[:2000])
    assert trained.fc1.shape[0] == 63
    stored = starter.store(start, trained, "q4_0")
    assert (stored.kind, stored.rank) == ("q4_0", 64)
    assert stored.shapes == ((64, weights.gate.shape[1]), (len(weights.gate), 64))
    exact = trained(inputs).detach()
    naive = in_q4_0(trained, inputs, 1.0, None, constant=True)
    spread = float(exact.var(0).mean())
    raw = labelled.rows.inputs_at(TRAIN[:2000])
    lengths = raw.square().mean(1, keepdim=True).sqrt()
    found, plain = (
        float((logits_of(each.predictor(), x) / by - exact).square().mean()) / spread
        for each, x, by in ((stored, raw, lengths), (naive, inputs, 1.0))
    )
    assert found < 0.08
    assert plain > 3 * found, (plain, found)


def test_types_are_weighed_where_a_bound_says_what_they_are_worth(tmp_path: Path) -> None:
    config = TrainConfig(traces=tmp_path, out=tmp_path)
    both = [Size(kind, rank) for kind in ("q4_0", "f16") for rank in (64, 128)]
    assert possible_sizes(config, 512, bounded=True) == both
    halves = [Size("f16", rank) for rank in (32, 64, 128)]
    assert possible_sizes(config, 512, bounded=False) == halves
    assert possible_sizes(replace(config, recipe="dejavu"), 512, bounded=True) == halves
    assert possible_sizes(config, 544, bounded=True) == halves, "no multiple of 64"
    asked = replace(config, predictor_type="q4_0")
    assert possible_sizes(asked, 512, bounded=False) == both[:2]
    mixed = replace(config, rank=(96, 128))
    assert possible_sizes(mixed, 512, 0, bounded=True) == [Size("f16", 96)]
    assert possible_sizes(mixed, 512, 1, bounded=True) == [both[1], both[3]]


@pytest.mark.parametrize("rank", [32, 96])
def test_ranks_that_a_type_cannot_have_are_refused(rank: int, tmp_path: Path) -> None:
    with refused(PredictorError, f"rank {rank}", "q4_0", "multiple of 64"):
        TrainConfig(traces=tmp_path, out=tmp_path, rank=rank, predictor_type="q4_0")
    TrainConfig(traces=tmp_path, out=tmp_path, rank=rank)


@pytest.fixture(scope="module")
def even_model(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose sizes fill Q4_0's blocks."""
    path = tmp_path_factory.mktemp("even") / "model"
    return make_model(path, intermediate_size=1024)


@pytest.fixture(scope="module")
def even_traces(
    even_model: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> TraceStore:
    out = tmp_path_factory.mktemp("even") / "traces"
    sizes: dict[str, Any] = {"tokens": 1000, "context": 64}
    return collect(CollectConfig(model=str(even_model), data=str(data_file), out=out, **sizes))


@pytest.fixture(scope="module")
def bounded(even_traces: TraceStore, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Train for a model in Q4_0, by a gap; layers choose their types."""
    config = TrainConfig(
        traces=even_traces.path,
        out=tmp_path_factory.mktemp("bounded") / "p",
        recipe="svd",
        max_ppl_gap=0.05,
        outtype="q4_0",
        eval_tokens=512,
    )
    train_predictors(config)
    return config


def test_an_export_follows_what_was_trained_for(
    bounded: TrainConfig, even_model: Path, tmp_path: Path
) -> None:
    artifact = PredictorArtifact.open(bounded.out)
    assert (artifact.header.predictor_type, artifact.header.outtype) == ("auto", "q4_0")
    assert set(artifact.types.values()) == {"q4_0"}
    out = tmp_path / "m.powerinfer.gguf"
    config = ExportConfig(model=str(even_model), predictors=bounded.out, out=out)
    export(config)
    file = GGUFFile(out)
    assert file.values[PREDICTOR_TYPE_KEY].data == b"q4_0"
    kinds = {name.split(".")[-2]: info.kind.name for name, info in file.tensors.items()}
    assert (kinds["fc1"], kinds["fc2"], kinds["ffn_up"]) == ("Q4_0", "Q4_0", "Q4_0")
    for layer in range(2):
        stored = artifact.layer(layer)
        for part, blocks in (("fc1", stored.fc1), ("fc2", stored.fc2)):
            found = file.mapped(f"blk.{layer}.{part}.weight")
            np.testing.assert_array_equal(found.reshape(-1), blocks.numpy().reshape(-1))
    assert verify(out).document()["ok"]
    for changes, told in (
        ({"outtype": "f16"}, "a model in q4_0, not in f16"),
        ({"predictor_type": "f16"}, "was trained for q4_0, not f16"),
    ):
        other: dict[str, Any] = {"out": tmp_path / "n.powerinfer.gguf", **changes}
        with refused(ExportError, str(bounded.out), told, "leave --"):
            export(replace(config, **other))
    assert not (tmp_path / "n.powerinfer.gguf").exists()


def test_decisions_are_the_engines(
    bounded: TrainConfig, even_traces: TraceStore, even_model: Path, tmp_path: Path
) -> None:
    """The embedded engine, on an exported file, and the artifact's predictor on its own inputs."""
    out = tmp_path / "m.powerinfer.gguf"
    export(ExportConfig(model=str(even_model), predictors=bounded.out, out=out))
    engine, artifact = Engine(out), PredictorArtifact.open(bounded.out)
    residual = even_traces.layer(1).inputs_at(torch.arange(300))
    linear_ = engine._operators.linear
    logits = linear_("blk.1.fc2", linear_("blk.1.fc1", residual).relu())
    found = logits_of(artifact.layer(1).predictor(), residual)
    assert torch.equal(found < engine.threshold, logits < engine.threshold)


def test_thresholds_are_chosen_again_for_another_type_of_model(
    bounded: TrainConfig, tmp_path: Path
) -> None:
    import shutil

    out = Path(shutil.copytree(bounded.out, tmp_path / "p"))
    before = PredictorArtifact.open(out)
    again = train_predictors(replace(bounded, out=out, outtype=None, resume=True))
    assert again.header.outtype == PredictorArtifact.open(out).header.outtype == "f16"
    assert again.search != before.search
    # The same predictors are a smaller share of an FFN of more bytes.
    for now, then in zip(again.rows(), before.rows(), strict=True):
        shares = [row["ffn_bytes_ratio"] - 1 + row["predicted_sparsity"] for row in (now, then)]
        assert shares[0] == pytest.approx(shares[1] * 18 / 64)


def test_a_rounded_model_is_what_the_file_holds(
    bounded: TrainConfig, even_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.powerinfer.gguf"
    export(ExportConfig(model=str(even_model), predictors=bounded.out, out=out))
    model, file = Checkpoint.open(even_model), Checkpoint.open(out)
    assert (own_type(model), own_type(file)) == ("f16", "q4_0")
    assert rounded(model, "f16") is model
    by_hand = rounded(model, "q4_0")
    for rule, _ in model.architecture.exported:
        for layer, _ in rule.places(model.shape):
            assert torch.equal(by_hand.read(rule, layer).float(), file.read(rule, layer).float())


def test_a_model_that_fills_no_blocks_is_refused_before_training(
    ranked_traces: TraceStore, tmp_path: Path
) -> None:
    config = TrainConfig(traces=ranked_traces.path, out=tmp_path / "p", outtype="q4_0")
    with refused(PredictorError, "--outtype q4_0", "d_ff 1012", "multiple of 64"):
        train_predictors(config)
    assert not config.out.exists()


def test_what_has_no_bound_may_still_be_stored_in_q4_0(
    ranked_traces: TraceStore, tmp_path: Path
) -> None:
    config = TrainConfig(
        traces=ranked_traces.path, out=tmp_path / "p", rank=64, recipe="svd", predictor_type="q4_0"
    )
    artifact = train_predictors(config)
    assert (artifact.kind(0), artifact.header.threshold) == ("q4_0", 0.0)
    recall = [metrics["activation_recall"] for metrics in artifact.layers.values()]
    plain = train_predictors(replace(config, out=tmp_path / "q", predictor_type="f16"))
    exact = [metrics["activation_recall"] for metrics in plain.layers.values()]
    assert np.mean(recall) > np.mean(exact) - 0.05
