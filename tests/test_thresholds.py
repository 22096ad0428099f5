"""Bounds on a whole model: ranks and thresholds are chosen, stored and exported."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_export, refused

from common.decisions import DecisionCounts
from common.element_types import ELEMENT_TYPES
from common.errors import PredictorError
from common.sealed import SEAL
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.engine import Engine
from predictor.artifact import PredictorArtifact
from predictor.module import Predictor, logits_of
from predictor.thresholds.choose import Bound, choose_thresholds, measured_by
from predictor.thresholds.predicted_model import Quality
from predictor.traces.rows import LabelledRows
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import DEJAVU, RECIPES, TrainConfig


@pytest.fixture(scope="module")
def calibrated(
    ranked_traces: TraceStore, tmp_path_factory: pytest.TempPathFactory
) -> PredictorArtifact:
    out = tmp_path_factory.mktemp("calibrated") / "predictors"
    return train_predictors(
        TrainConfig(traces=ranked_traces.path, out=out, rank=(32, 64), recipe="svd", ffn_bytes=0.45)
    )


def test_an_exported_file_decides_as_calibrated(
    calibrated: PredictorArtifact, ranked_traces: TraceStore, model_dir: Path, tmp_path: Path
) -> None:
    """The engine's counts on one long text are those of the artifact's own weights."""
    assert calibrated.header.threshold == 1.0
    assert [calibrated.rank(n) for n in range(2)] == [32, 64]
    bundle = make_export(model_dir, calibrated.path, tmp_path / "m.powerinfer.gguf")
    engine = Engine(bundle.model_file)
    assert engine.threshold == 1.0
    tokens = [1, *engine.vocabulary.encode("Neurons are skipped by thresholds. " * 3)][:60]
    counts = engine.count()
    engine.forward(tokens, KVCache(2))
    layer = calibrated.layer(0)
    predictor = Predictor(layer.fc1.float(), layer.fc2.float())
    residual: list[torch.Tensor] = []
    from architectures.checkpoint import Checkpoint
    from architectures.model import load_model

    model = load_model(Checkpoint.open(model_dir), dtype=torch.float32, device="cpu")
    norm = model.blocks[0].get_submodule("post_attention_layernorm")
    norm.register_forward_pre_hook(lambda module, args: residual.append(args[0][0]))
    model.through(torch.tensor([tokens]))
    decided = logits_of(predictor, residual[0]) >= 1.0
    assert counts[0].predicted == pytest.approx(int(decided.sum()), abs=len(tokens))
    assert 0.005 < decided.float().mean() < 0.6


def test_more_neurons_than_training_would_compute_are_exported(
    ranked_traces: TraceStore, model_dir: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        traces=ranked_traces.path, out=tmp_path / "p", rank=32, recipe="svd", ffn_bytes=0.9
    )
    artifact = train_predictors(config)
    assert artifact.header.threshold == -1.0
    assert PredictorArtifact.open(config.out).header.threshold == -1.0
    bundle = make_export(model_dir, artifact.path, tmp_path / "m.powerinfer.gguf")
    engine = Engine(bundle.model_file)
    assert engine.threshold == -1.0
    tokens = [1, *engine.vocabulary.encode("Neurons are skipped by thresholds. " * 3)][:60]
    counts = engine.count()
    engine.forward(tokens, KVCache(2))
    told = [1 - metrics["predicted_sparsity"] for metrics in artifact.layers.values()]
    found = [layer.predicted / layer.decisions for layer in counts]
    assert found == pytest.approx(told, abs=0.1)
    # With threshold 0 the same predictors compute far fewer.
    assert min(told) > 0.6
    plain = train_predictors(
        TrainConfig(traces=ranked_traces.path, out=tmp_path / "q", rank=32, recipe="svd")
    )
    assert max(1 - metrics["predicted_sparsity"] for metrics in plain.layers.values()) < 0.6


def test_thresholds_of_another_sign_are_refused(
    calibrated: PredictorArtifact, tmp_path: Path
) -> None:
    import json

    out = Path(shutil.copytree(calibrated.path, tmp_path / "p"))
    document = json.loads((out / "predictors.json").read_text())
    document["header"]["threshold"] = -1.0
    document.pop(SEAL)
    (out / "predictors.json").write_text(json.dumps(document))
    with refused(PredictorError, "layer-00", "sign of -1", "--resume"):
        PredictorArtifact.open(out).layer(0)


def test_metrics_are_told_of_the_thresholds(
    calibrated: PredictorArtifact, ranked_traces: TraceStore
) -> None:
    ratios = [metrics["ffn_bytes_ratio"] for metrics in calibrated.layers.values()]
    assert sum(ratios) / 2 == pytest.approx(0.45, abs=0.03)
    held = ranked_traces.holdout(0.1, 0).nonzero()[:, 0]
    for number, metrics in calibrated.layers.items():
        rows = LabelledRows(
            ranked_traces.layer(number), ranked_traces.weights(number), normalise=True
        )
        layer = calibrated.layer(number)
        predictor, width = layer.predictor(), ELEMENT_TYPES[layer.kind].width
        counts = DecisionCounts()
        counts.add(rows.active(held), logits_of(predictor, rows.rows.inputs_at(held)) >= 1.0)
        expected = counts.metrics(rank=layer.rank, d_model=64, d_ff=1012, predictor_width=width)
        error = metrics.pop("ffn_output_error")
        assert metrics == pytest.approx(expected, abs=2e-3)
        assert error > 0
        metrics["ffn_output_error"] = error
    assert [point.chosen for point in calibrated.search] == [True]


def test_another_bound_needs_no_training(
    calibrated: PredictorArtifact, ranked_traces: TraceStore, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(calibrated.path, tmp_path / "predictors"))
    config = TrainConfig(
        traces=ranked_traces.path, out=out, rank=(32, 64), recipe="svd", ffn_bytes=0.35, resume=True
    )
    again = train_predictors(config)
    assert torch.equal(again.layer(0).fc1, calibrated.layer(0).fc1)
    assert not torch.equal(again.layer(0).fc2, calibrated.layer(0).fc2)
    ratios = [metrics["ffn_bytes_ratio"] for metrics in again.layers.values()]
    assert sum(ratios) / 2 == pytest.approx(0.35, abs=0.03)


def test_points_without_a_finite_perplexity_are_kept_as_not_measured(
    calibrated: PredictorArtifact, tmp_path: Path
) -> None:
    class Model:
        def __init__(self) -> None:
            self.answers = iter([math.nan, math.nan])  # one of them at a glance

        def quality(self, *_: object, every: int) -> Quality:
            sparse = next(self.answers, 1.2)
            return Quality(
                ppl_dense=1.0, ppl_sparse=sparse, kl_divergence=sparse - 1, standard_error=0.0
            )

    artifact = PredictorArtifact.open(Path(shutil.copytree(calibrated.path, tmp_path / "p")))
    model: Any = Model()
    bound = Bound(max_ppl_gap=0.5)
    choose_thresholds(artifact, bound, 3, lambda: measured_by(artifact, model))
    assert PredictorArtifact.open(artifact.path).search == artifact.search
    gaps = [point.ppl_gap for point in artifact.search]
    assert gaps.count(None) == 1
    assert sum(point.chosen for point in artifact.search) == 1


def test_ranks_and_thresholds_are_chosen_for_a_gap(
    ranked_traces: TraceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    config = TrainConfig(
        traces=ranked_traces.path, out=tmp_path / "p", rank="auto", recipe="svd", max_ppl_gap=0.5
    )
    artifact = train_predictors(config, notes.append)
    assert set(artifact.ranks) == {0, 1}
    assert any("held-out tokens" in line for line in notes)
    chosen = [point for point in artifact.search if point.chosen]
    assert len(chosen) == 1
    assert chosen[0].kl_divergence is not None
    assert chosen[0].kl_divergence <= 0.4055  # ln 1.5
    assert chosen[0].ppl_gap is not None
    artifact.require_complete()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"max_ppl_gap": 0.1, "ffn_bytes": 0.1}, "two bounds"),
        ({"rank": "all"}, "rank 'all'"),
        ({"rank": (32, 48)}, "rank 48 cannot run"),
        ({"predictor_type": "q8_0"}, "--predictor-type is 'q8_0'"),
    ],
)
def test_settings_that_contradict_are_refused(changes: dict[str, Any], problem: str) -> None:
    settings: dict[str, Any] = {"traces": Path("t"), "out": Path("o"), "rank": 32}
    with refused(PredictorError, problem):
        TrainConfig(**(settings | changes))


def test_ranks_for_other_layers_are_refused(ranked_traces: TraceStore, tmp_path: Path) -> None:
    config = TrainConfig(traces=ranked_traces.path, out=tmp_path / "p", rank=(32, 32, 32))
    with refused(PredictorError, "names 3 ranks", "2 layers"):
        train_predictors(config)


def test_another_model_is_not_measured(
    ranked_traces: TraceStore, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", seed=5)
    config = TrainConfig(
        traces=ranked_traces.path,
        out=tmp_path / "p",
        rank=32,
        recipe="svd",
        max_ppl_gap=0.5,
        model=str(other),
    )
    with refused(PredictorError, str(other), "differ from the model", "--model"):
        train_predictors(config)
    assert len(PredictorArtifact.open(tmp_path / "p").layers) == 2


def test_predictors_without_their_thresholds_are_not_exported(
    ranked_traces: TraceStore, model_dir: Path, tmp_path: Path
) -> None:
    """A bound out of reach leaves trained layers, which threshold 1 would cripple."""
    out = tmp_path / "p"
    config = TrainConfig(traces=ranked_traces.path, out=out, rank=32, recipe="svd", ffn_bytes=0.1)
    with refused(PredictorError, "--ffn-bytes 0.1 is out of reach"):
        train_predictors(config)
    assert len(PredictorArtifact.open(out).layers) == 2
    with refused(PredictorError, str(out), "thresholds have not been chosen", "--resume"):
        make_export(model_dir, out, tmp_path / "m.powerinfer.gguf")
    again = train_predictors(replace(config, ffn_bytes=0.4, resume=True))
    assert again.search
    make_export(model_dir, out, tmp_path / "m.powerinfer.gguf")


def test_training_that_diverges_is_refused_with_its_layer(
    ranked_traces: TraceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of the epoch in which it does."""
    hot = replace(DEJAVU, name="hot", learning_rate=1e25, epochs=1000, patience=1000)
    monkeypatch.setitem(RECIPES, "dejavu", hot)
    config = TrainConfig(traces=ranked_traces.path, out=tmp_path / "p", rank=32, recipe="dejavu")
    with refused(PredictorError, "layer 0", "diverged", "check the traces"):
        train_predictors(config)
