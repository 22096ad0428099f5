"""The report: files that parse and agree, figures of whatever was measured, whole or absent."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from conftest import exact, refused, write_predictors
from matplotlib.figure import Figure
from PIL import Image

from common.errors import OutputError, PredictorError, PspError
from common.sealed import SEAL, read_sealed
from common.typed_json import plain
from predictor.artifact import Epoch, PredictorArtifact
from predictor.reporting.metrics import LayerMeasurement, Sweep, sweep_thresholds
from predictor.reporting.report import make_report, report_predictors, write_report
from predictor.traces.store import TraceStore
from report.figures.predictors import (
    curves_figure,
    draw_report,
    hot_figure,
    layers_figure,
    pareto_front,
    search_figure,
)
from report.figures.style import save, style
from results.predictors import PREDICTORS, PredictorReport, SearchPoint

PLOTS = ("layers", "curves", "search", "hot_neurons")
POINTS = (
    SearchPoint(ffn_bytes_ratio=0.1, ppl_gap=0.002, price=1.0),
    SearchPoint(ffn_bytes_ratio=0.2, ppl_gap=0.0001, price=0.1, chosen=True),
    SearchPoint(ffn_bytes_ratio=0.3, price=0.0),
)
SCREEN = 100
"""Dots per inch that are enough to see that something is drawn."""

draw = partial(draw_report, dpi=SCREEN)


def nothing(out: Path, report: PredictorReport) -> None:
    """Draw nothing, where numbers alone are looked at."""


def report_of(
    layers: Sequence[LayerMeasurement], points: Sequence[SearchPoint] = ()
) -> PredictorReport:
    return make_report(
        layers,
        points,
        model="m",
        recipe={"name": "psp"},
        threshold=0.0,
        held_out_tokens=20,
        average_precision_tokens=20,
        predictor_type="f16",
    )


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
        kind="f16",
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
def made(layers: list[LayerMeasurement]) -> PredictorReport:
    return report_of(layers, POINTS)


@pytest.fixture(scope="module")
def report(made: PredictorReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report"
    write_report(out, made, draw)
    return out


def test_every_file_is_there_and_parses(report: Path) -> None:
    tables = {f"{name}.csv" for name in PLOTS}
    images = {f"{name}.{kind}" for name in PLOTS for kind in ("png", "svg")}
    assert set(contents(report)) == tables | images | {"report.json"}
    for name in PLOTS:
        with Image.open(report / f"{name}.png") as image:
            image.load()
            assert min(image.size) > 3 * SCREEN
            assert len(set(image.convert("L").tobytes())) > 16
        assert ElementTree.parse(report / f"{name}.svg").getroot().tag.endswith("svg")


def test_figures_are_for_print(tmp_path: Path) -> None:
    with style():
        save(search_figure(POINTS), tmp_path, "search")
    with Image.open(tmp_path / "search.png") as image:
        assert image.size == (1040, 720)  # 200 dots per inch


def test_the_document_and_the_tables_say_the_same(
    report: Path, layers: list[LayerMeasurement]
) -> None:
    document = json.loads((report / "report.json").read_text(), parse_constant=pytest.fail)
    assert plain(PREDICTORS.read(report)) == read_sealed(report / "report.json", PspError, "")
    assert document["model"] == "m"
    assert document["layers"][1] == {"layer": 1, "rank": 32, "type": "f16", **layers[1].metrics}
    recalls = [layer.metrics["activation_recall"] for layer in layers]
    assert document["mean"]["activation_recall"] == pytest.approx(sum(recalls) / 2)
    for name in PLOTS:
        rows = read_csv(report / f"{name}.csv")
        assert len(rows) == len(document[name])
        for row, entry in zip(rows, document[name], strict=True):
            assert list(row) == list(entry) or name == "search"
            assert row == {key: "" if value is None else str(value) for key, value in entry.items()}
    assert list(read_csv(report / "search.csv")[0])[:4] == [
        *("ffn_bytes_ratio", "ppl_gap", "price", "chosen")
    ]


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
    report: Path, made: PredictorReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    with matplotlib.rc_context({"font.size": 3, "axes.facecolor": "pink"}):
        before = matplotlib.rcParams.copy()
        out = tmp_path / "again"
        write_report(out, made, draw)
        assert matplotlib.rcParams.copy() == before
    assert contents(out) == contents(report)


def test_an_existing_directory_is_replaced_only_if_asked_and_ours(
    layers: list[LayerMeasurement], tmp_path: Path
) -> None:
    write_report(tmp_path / "out", report_of(layers[:1]), nothing)
    old, both = contents(tmp_path / "out"), report_of(layers)
    with refused(OutputError, "out exists", "--force"):
        write_report(tmp_path / "out", both, nothing)
    assert contents(tmp_path / "out") == old
    write_report(tmp_path / "out", both, nothing, force=True)
    assert contents(tmp_path / "out") != old
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with refused(OutputError, "mine was not made by this command"):
        write_report(tmp_path / "mine", both, nothing, force=True)


def test_a_report_that_fails_leaves_nothing(made: PredictorReport, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path / "out", made, fail)
    assert not list(tmp_path.iterdir())


def computes_nothing() -> LayerMeasurement:
    layer = measured(0)
    last = len(layer.curve.thresholds) - 1
    metrics = layer.curve.counts(last).metrics(rank=32, d_model=64, d_ff=64)
    return replace(layer, chosen=last, metrics=metrics)


@pytest.mark.parametrize(
    ("layers", "points"),
    [
        ([measured(0, share=0)], []),
        ([measured(0, share=1), measured(1, share=0)], [POINTS[2]]),
        ([measured(0, importance=False)], POINTS[:1]),
        ([measured(n) for n in range(0, 68, 2)], POINTS),
        ([computes_nothing()], []),
    ],
    ids=["dead", "one class", "no importance", "34 layers", "computes nothing"],
)
def test_whatever_was_measured_can_be_drawn(
    layers: list[LayerMeasurement], points: Sequence[SearchPoint], tmp_path: Path
) -> None:
    report = report_of(layers, points)
    write_report(tmp_path / "out", report, nothing)
    text = (tmp_path / "out" / "report.json").read_text()
    document = json.loads(text, parse_constant=pytest.fail)  # JSON has no NaN
    assert document.keys() == {*plain(report), SEAL}
    assert len(report.layers) == len(layers)
    assert PREDICTORS.read(tmp_path / "out") == report
    figures: list[Callable[[], Figure]] = [
        lambda: layers_figure(report.layers),
        lambda: curves_figure(report.curves),
        lambda: search_figure(report.search),
        lambda: hot_figure(report),
    ]
    with style():
        for make in figures:
            make().draw_without_rendering()


def test_a_layer_that_computes_nothing_ends_at_its_threshold(tmp_path: Path) -> None:
    write_report(tmp_path / "out", report_of([computes_nothing()]), nothing)
    rows = read_csv(tmp_path / "out" / "curves.csv")
    assert rows[-1]["chosen"] == "True"
    assert float(rows[-1]["density"]) == 0


@pytest.mark.parametrize(
    ("gaps", "scale"),
    [([0.1, 0.0001], "log"), ([0.1, 0.05], "linear"), ([0.1, -0.001], "symlog"), ([0], "linear")],
)
def test_the_scale_of_gaps_fits_them(gaps: list[float], scale: str) -> None:
    (axes,) = search_figure(
        [SearchPoint(price=1, ffn_bytes_ratio=0.1, ppl_gap=gap, chosen=True) for gap in gaps]
    ).axes
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    assert all(low < 100 * gap < high for gap in gaps)


def test_the_front_holds_what_no_other_point_beats() -> None:
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 5.0), (2.0, 4.0), (4.0, 1.0), (1.0, 6.0), (3.0, 1.0)]
    assert pareto_front(points) == [(1.0, 5.0), (2.0, 4.0), (3.0, 1.0)]
    assert pareto_front([]) == []


def test_chosen_points_stand_where_the_metrics_say(made: PredictorReport) -> None:
    recall, _ = curves_figure(made.curves).axes
    marks = [line for line in recall.lines if line.get_marker() == "o"]
    for mark, layer in zip(marks, made.layers, strict=True):
        assert mark.get_xdata() == pytest.approx(100 * (1 - layer.predicted_sparsity))
        assert mark.get_ydata() == pytest.approx(100 * layer.activation_recall)


@pytest.fixture
def artifact(model_dir: Path, traces: TraceStore, tmp_path: Path) -> PredictorArtifact:
    """Predictors whose logits are the gate itself."""
    made = write_predictors(model_dir, tmp_path / "exact", exact)
    made.header = replace(made.header, traces_identity=traces.identity)
    return made


def test_exact_predictors_miss_next_to_nothing(
    artifact: PredictorArtifact, traces: TraceStore, tmp_path: Path
) -> None:
    artifact.search = list(POINTS)
    artifact.epochs[1] = (Epoch(loss=0.5, held_out_loss=0.6, held_out_error=0.1),)
    report = report_predictors(tmp_path / "out", traces, artifact, draw=nothing)
    assert plain(report) == read_sealed(tmp_path / "out" / "report.json", PspError, "")
    assert [layer.layer for layer in report.layers] == [0, 1]
    mean = report.mean
    assert mean.activation_recall > 0.999
    assert mean.average_precision is not None
    assert mean.average_precision > 0.999
    assert mean.missed_importance is not None
    assert mean.missed_importance < 1e-3
    # A predictor of rank 2 d_model reads 2 · 64 · (64 + 1012) of the FFN's 3 · 64 · 1012.
    predictor = 2 * (64 + 1012) / (3 * 1012)
    assert mean.ffn_bytes_ratio == pytest.approx(predictor + 1 - mean.predicted_sparsity)
    assert report.held_out_tokens == int(traces.holdout(0.1, 0).sum())
    assert report.search == POINTS
    assert [vars(epoch) for epoch in report.epochs] == [
        {"layer": 1, "epoch": 1, "loss": 0.5, "held_out_loss": 0.6, "held_out_error": 0.1}
    ]


def test_other_traces_and_unfinished_predictors_are_refused(
    artifact: PredictorArtifact, traces: TraceStore, tmp_path: Path
) -> None:
    artifact.layers.clear()
    with refused(PredictorError, "no finished layer", "train one first"):
        report_predictors(tmp_path / "out", traces, artifact, draw=nothing)
    artifact.header = replace(artifact.header, traces_identity="other")
    with refused(PredictorError, "other traces", str(traces.path)):
        report_predictors(tmp_path / "out", traces, artifact, draw=nothing)
    assert not (tmp_path / "out").exists()
