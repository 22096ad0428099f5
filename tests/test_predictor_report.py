"""The report: files that parse and agree, plots of whatever was measured, whole or absent."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from conftest import exact, refused, write_predictors
from PIL import Image

from common.errors import OutputError, PredictorError
from predictor.artifact import PredictorArtifact
from predictor.reporting.metrics import LayerMeasurement
from predictor.reporting.plots import search_front, threshold_curves
from predictor.reporting.report import report_predictors, write_report
from predictor.reporting.sweep import Sweep, sweep_thresholds
from predictor.traces.store import TraceStore

PLOTS = ("layers", "curves", "search", "hot_neurons")
POINTS: list[dict[str, Any]] = [
    {"ffn_bytes_ratio": 0.1, "ppl_gap": 0.002, "price": 1.0, "chosen": False, "ranks": [32, 64]},
    {"ffn_bytes_ratio": 0.2, "ppl_gap": 0.0001, "price": 0.1, "chosen": True, "ranks": [64, 64]},
    {"ffn_bytes_ratio": 0.3, "ppl_gap": None, "price": 0.0, "chosen": False},
]


def measured(layer: int, *, share: float = 0.1, importance: bool = True) -> LayerMeasurement:
    """Measure random logits of which those of a given share are active."""
    generator = torch.Generator().manual_seed(layer)
    logits = torch.randn(20, 64, generator=generator) - 1
    active = torch.rand(20, 64, generator=generator) < share
    sweep = Sweep(sweep_thresholds(0))
    sweep.add(logits, active, active * 0.1 if importance else None, torch.ones(20))
    curve = sweep.curve()
    chosen = curve.position(0)
    metrics = curve.counts(chosen).metrics(rank=32, d_model=64, d_ff=64)
    return LayerMeasurement(
        layer=layer,
        rank=32,
        metrics=metrics,
        curve=curve,
        chosen=chosen,
        activation_counts=active.sum(0),
    )


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def layers() -> list[LayerMeasurement]:
    return [measured(0), measured(1, share=0.3)]


@pytest.fixture(scope="module")
def report(layers: list[LayerMeasurement], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report"
    write_report(out, layers, points=POINTS, facts={"model": "m", "ppl_gap": float("inf")})
    return out


def test_every_file_is_there_and_parses(report: Path) -> None:
    tables = {f"{name}.csv" for name in PLOTS}
    images = {f"{name}.{kind}" for name in PLOTS for kind in ("png", "svg")}
    assert set(contents(report)) == tables | images | {"report.json"}
    for name in PLOTS:
        with Image.open(report / f"{name}.png") as image:
            image.load()
            assert min(image.size) > 600
            assert len(set(image.convert("L").tobytes())) > 16
        assert ElementTree.parse(report / f"{name}.svg").getroot().tag.endswith("svg")


def test_the_document_and_the_tables_say_the_same(
    report: Path, layers: list[LayerMeasurement]
) -> None:
    document = json.loads((report / "report.json").read_text(), parse_constant=pytest.fail)
    assert document["model"] == "m"
    assert document["ppl_gap"] is None
    assert document["layers"][1] == {"layer": 1, "rank": 32, **layers[1].metrics}
    recalls = [layer.metrics["activation_recall"] for layer in layers]
    assert document["mean"]["activation_recall"] == pytest.approx(sum(recalls) / 2)
    for name in PLOTS:
        rows = read_csv(report / f"{name}.csv")
        assert len(rows) == len(document[name])
        for row, entry in zip(rows, document[name], strict=True):
            for key, value in entry.items():
                words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
                assert row[key] == ("" if value is None else words)


def test_curves_go_from_everything_to_nothing_through_the_exported_threshold(
    report: Path, layers: list[LayerMeasurement]
) -> None:
    rows = [row for row in read_csv(report / "curves.csv") if row["layer"] == "1"]
    assert (float(rows[0]["density"]), float(rows[-1]["density"])) == (1, 0)
    (chosen,) = (row for row in rows if row["chosen"] == "True")
    assert float(chosen["threshold"]) == 0
    metrics = layers[1].metrics
    assert float(chosen["recall"]) == metrics["activation_recall"]
    assert float(chosen["density"]) == pytest.approx(1 - metrics["predicted_sparsity"])
    # Runs at both ends under which nothing changes are left out.
    assert float(rows[1]["density"]) < 1
    assert float(rows[-2]["density"]) > 0


def test_the_same_numbers_give_the_same_bytes_under_any_style(
    report: Path, layers: list[LayerMeasurement], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    with matplotlib.rc_context({"font.size": 3, "axes.facecolor": "pink"}):
        before = matplotlib.rcParams.copy()
        out = tmp_path / "again"
        write_report(out, layers, points=POINTS, facts={"model": "m", "ppl_gap": float("inf")})
        assert matplotlib.rcParams.copy() == before
    assert contents(out) == contents(report)


def test_an_existing_directory_is_replaced_only_if_asked_and_ours(
    layers: list[LayerMeasurement], tmp_path: Path
) -> None:
    write_report(tmp_path / "out", layers[:1])
    old = contents(tmp_path / "out")
    with refused(OutputError, "out exists", "--force"):
        write_report(tmp_path / "out", layers)
    assert contents(tmp_path / "out") == old
    write_report(tmp_path / "out", layers, force=True)
    assert contents(tmp_path / "out") != old
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with refused(OutputError, "mine was not made by this command"):
        write_report(tmp_path / "mine", layers, force=True)


def test_a_report_that_fails_leaves_nothing(
    layers: list[LayerMeasurement], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("predictor.reporting.plots.draw", fail)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path / "out", layers)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layers", "points"),
    [
        ([measured(0, share=0)], []),
        ([measured(0, share=1), measured(1, share=0)], [POINTS[2]]),
        ([measured(0, importance=False)], POINTS[:1]),
        ([measured(n) for n in range(0, 160, 2)], [POINTS[0] | {"ppl_gap": float("nan")}]),
    ],
    ids=["dead", "one class", "no importance", "eighty layers"],
)
def test_whatever_was_measured_can_be_drawn(
    layers: list[LayerMeasurement], points: list[dict[str, Any]], tmp_path: Path
) -> None:
    document = write_report(tmp_path / "out", layers, points=points)
    assert len(list((tmp_path / "out").iterdir())) == 13
    # JSON has no NaN.
    text = (tmp_path / "out" / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == document
    assert len(document["layers"]) == len(layers)


def test_a_layer_that_computes_nothing_can_be_drawn(tmp_path: Path) -> None:
    layer = measured(0)
    last = len(layer.curve.thresholds) - 1
    metrics = layer.curve.counts(last).metrics(rank=32, d_model=64, d_ff=64)
    write_report(tmp_path / "out", [replace(layer, chosen=last, metrics=metrics)])
    rows = read_csv(tmp_path / "out" / "curves.csv")
    assert rows[-1]["chosen"] == "True"
    assert float(rows[-1]["density"]) == 0


@pytest.mark.parametrize(
    ("gaps", "scale"),
    [([0.1, 0.0001], "log"), ([0.1, 0.05], "linear"), ([0.1, -0.001], "symlog"), ([0], "linear")],
)
def test_the_scale_of_gaps_fits_them(gaps: list[float], scale: str) -> None:
    (axes,) = search_front(
        [{"ffn_bytes_ratio": 0.1, "ppl_gap": gap, "chosen": True} for gap in gaps]
    ).axes
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    assert all(low < 100 * gap < high for gap in gaps)


def test_chosen_points_stand_where_the_metrics_say(layers: list[LayerMeasurement]) -> None:
    recall, _ = threshold_curves(layers).axes
    marks = [line for line in recall.lines if line.get_marker() == "o"]
    for mark, layer in zip(marks, layers, strict=True):
        assert mark.get_xdata() == pytest.approx(100 * (1 - layer.metrics["predicted_sparsity"]))
        assert mark.get_ydata() == pytest.approx(100 * layer.metrics["activation_recall"])


@pytest.fixture
def artifact(model_dir: Path, traces: TraceStore, tmp_path: Path) -> PredictorArtifact:
    """Predictors whose logits are the gate itself."""
    made = write_predictors(model_dir, tmp_path / "exact", exact)
    made.header = replace(made.header, traces_identity=traces.identity)
    return made


def test_exact_predictors_miss_next_to_nothing(
    artifact: PredictorArtifact, traces: TraceStore, tmp_path: Path
) -> None:
    facts = {"ppl_gap": 0.0}
    document = report_predictors(tmp_path / "out", traces, artifact, facts=facts)
    assert document == json.loads((tmp_path / "out" / "report.json").read_text())
    assert [layer["layer"] for layer in document["layers"]] == [0, 1]
    mean = document["mean"]
    assert mean["activation_recall"] > 0.999
    assert mean["average_precision"] > 0.999
    assert mean["missed_importance"] < 1e-3
    # A predictor of rank 2 d_model reads 2 · 64 · (64 + 1012) of the FFN's 3 · 64 · 1012.
    predictor = 2 * (64 + 1012) / (3 * 1012)
    assert mean["ffn_bytes_ratio"] == pytest.approx(predictor + 1 - mean["predicted_sparsity"])
    assert document["held_out_tokens"] == int(traces.holdout(0.1, 0).sum())
    assert document["ppl_gap"] == 0


def test_other_traces_and_unfinished_predictors_are_refused(
    artifact: PredictorArtifact, traces: TraceStore, tmp_path: Path
) -> None:
    artifact.layers.clear()
    with refused(PredictorError, "no finished layer", "train one first"):
        report_predictors(tmp_path / "out", traces, artifact)
    artifact.header = replace(artifact.header, traces_identity="other")
    with refused(PredictorError, "other traces", str(traces.path)):
        report_predictors(tmp_path / "out", traces, artifact)
    assert not (tmp_path / "out").exists()
