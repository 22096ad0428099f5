"""The report on a model's predictors: numbers as JSON and CSV, and figures.

Layout of a directory::

    report.json                       everything below, see `results.predictors`
    layers.csv                        one row a layer: its metrics
    curves.csv                        one row a layer and threshold of the sweep
    search.csv                        one row a point that the search explored
    hot_neurons.csv                   one row a layer and share of hottest neurons
    layers.png  curves.png            the same as figures, each as SVG too
    search.png  hot_neurons.png
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from common.decisions import mean_metrics
from common.element_types import ELEMENT_TYPES
from common.errors import PredictorError
from common.files import atomic_directory, refuse_existing
from common.hot_neurons import SHARES, hot_neuron_curve
from common.lock import locked
from common.typed_json import parse, plain
from common.version import tool_version
from predictor.artifact import BYTES_WITH_PREDICTOR, PredictorArtifact
from predictor.dense_layer import worth_line
from predictor.reporting.metrics import LayerMeasurement, measure_predictor, sample_rows
from predictor.traces.rows import LabelledRows
from predictor.traces.store import TraceStore
from results.predictors import (
    PREDICTORS,
    CurvePoint,
    EpochPoint,
    HotShare,
    PredictorLayer,
    PredictorMetrics,
    PredictorReport,
    SearchPoint,
)

Draw = Callable[[Path, PredictorReport], None]
"""Writes the figures into a directory: `report.figures.predictors.draw_report`, which this room
may not import."""

_FIRST = ("ffn_bytes_ratio", "ppl_gap", "price", "chosen")
"""Columns of search.csv that are always there, and first."""


def report_predictors(
    out: Path,
    store: TraceStore,
    artifact: PredictorArtifact,
    *,
    draw: Draw,
    force: bool = False,
) -> PredictorReport:
    """Measure the finished layers of an artifact on its held-out documents and write the report.

    Args:
        out: directory to make.
        store: the traces that the artifact was trained from.
        artifact: the predictors.
        draw: writes the figures.
        force: replace an older report.

    Returns:
        The document of `report.json`.

    Raises:
        PspError: traces of another collection, no finished layer in them, or existing output.
    """
    refuse_existing(out, force=force, marker=PREDICTORS.name)
    measured = measure_predictors(store, artifact)
    header = artifact.header
    report = make_report(
        measured,
        artifact.search,
        model=header.model,
        recipe=header.recipe,
        threshold=header.threshold,
        held_out_tokens=int(store.holdout(header.holdout, header.seed).sum()),
        average_precision_tokens=sample_rows(header.d_ff),
        predictor_type=header.predictor_type,
        outtype=header.outtype,
        epochs=tuple(_epochs(artifact)),
        dense={
            n: artifact.dense[n] for n in (each.layer for each in measured) if n in artifact.dense
        },
    )
    write_report(out, report, draw, force=force)
    return report


def measure_predictors(store: TraceStore, artifact: PredictorArtifact) -> list[LayerMeasurement]:
    """Measure every finished layer that the traces hold, one in memory at a time.

    Raises:
        PspError: see `report_predictors`.
    """
    header = artifact.header
    if header.traces_identity != store.identity:
        raise PredictorError(
            f"{artifact.path}: was trained from other traces than {store}", "pass those"
        )
    layers = [layer for layer in store.header.layers if layer in artifact.layers]
    if not layers:
        raise PredictorError(
            f"{artifact.path}: holds no finished layer of {store}", "train one first"
        )
    held = store.holdout(header.holdout, header.seed).nonzero()[:, 0]
    return [
        measure_predictor(
            LabelledRows(store.layer(layer), store.weights(layer), normalise=False),
            held,
            artifact.layer(layer),
            layer=layer,
            threshold=header.threshold,
            ffn_matrices=store.header.ffn_matrices,
            ffn=ELEMENT_TYPES[header.outtype],
            seed=header.seed,
        )
        for layer in tqdm(layers, unit="layer", desc="report", disable=None)
    ]


def make_report(
    layers: Sequence[LayerMeasurement],
    search: Sequence[SearchPoint],
    *,
    model: str,
    recipe: dict[str, object],
    threshold: float,
    held_out_tokens: int,
    average_precision_tokens: int,
    predictor_type: str,
    outtype: str | None = None,
    epochs: Sequence[EpochPoint] = (),
    dense: Mapping[int, float] | None = None,
) -> PredictorReport:
    """Return the document of measured layers, at least one; see `PredictorReport`.

    `dense` maps dense layers to the FFN bytes ratio that they have with their predictor.
    """
    dense = dense or {}
    ratios = {each.layer: each.metrics["ffn_bytes_ratio"] for each in layers}
    return PredictorReport(
        tool_version=tool_version(),
        model=model,
        recipe=recipe,
        threshold=threshold,
        held_out_tokens=held_out_tokens,
        average_precision_tokens=average_precision_tokens,
        predictor_type=predictor_type,
        outtype=outtype,
        mean=PredictorMetrics(**mean_metrics([layer.metrics for layer in layers])),
        layers=tuple(_layer(each, dense.get(each.layer)) for each in layers),
        search=tuple(search),
        curves=tuple(point for layer in layers for point in _curve(layer)),
        hot_neurons=tuple(_hot_shares(layers)),
        epochs=tuple(epochs),
        worth=worth_line(ratios, dense),
    )


def _layer(measured: LayerMeasurement, with_predictor: float | None) -> PredictorLayer:
    facts = {"layer": measured.layer, "rank": measured.rank, "type": measured.kind}
    return parse(
        PredictorLayer, {**facts, **measured.metrics, BYTES_WITH_PREDICTOR: with_predictor}
    )


def _epochs(artifact: PredictorArtifact) -> Iterator[EpochPoint]:
    for layer, epochs in sorted(artifact.epochs.items()):
        for number, epoch in enumerate(epochs, 1):
            yield EpochPoint(layer=layer, epoch=number, **vars(epoch))


def _curve(layer: LayerMeasurement) -> Iterator[CurvePoint]:
    """Yield a point a threshold, without the runs at both ends under which nothing changes."""
    curve = layer.curve
    changes = curve.predicted.diff().nonzero()[:, 0].tolist() or [layer.chosen]
    first, last = min(changes[0], layer.chosen), max(changes[-1] + 1, layer.chosen)
    density, recall = curve.density, curve.recall
    missed, error = curve.missed_importance, curve.ffn_output_error
    for position in range(first, min(last, len(curve.thresholds) - 1) + 1):
        yield CurvePoint(
            layer=layer.layer,
            chosen=position == layer.chosen,
            threshold=float(curve.thresholds[position]),
            density=float(density[position]),
            recall=float(recall[position]),
            missed_importance=None if missed is None else float(missed[position]),
            ffn_output_error=None if error is None else float(error[position]),
        )


def _hot_shares(layers: Sequence[LayerMeasurement]) -> Iterator[HotShare]:
    """Yield a row a share, for every layer that has activations and for all together."""
    counts: dict[int | Literal["all"], torch.Tensor] = {
        layer.layer: layer.activation_counts for layer in layers
    }
    counts["all"] = torch.stack(list(counts.values()))
    for name, values in counts.items():
        captured = hot_neuron_curve(values)
        for neurons, activations in zip(SHARES, captured or (), strict=captured is not None):
            yield HotShare(layer=name, neuron_share=neurons, activation_share=activations)


def write_report(out: Path, report: PredictorReport, draw: Draw, *, force: bool = False) -> None:
    """Write a report, whole or not at all.

    Args:
        out: directory to make.
        report: the document.
        draw: writes the figures.
        force: replace an older report.

    Raises:
        OutputError: `out` exists and may not be replaced, or cannot be written.
    """
    refuse_existing(out, force=force, marker=PREDICTORS.name)
    document = plain(report)
    with locked(out), atomic_directory(out) as part:
        PREDICTORS.write(part, report)
        for name in ("layers", "curves", "search", "hot_neurons"):
            _write_csv(part / f"{name}.csv", document[name], _FIRST if name == "search" else ())
        draw(part, report)


def _write_csv(path: Path, rows: Sequence[Mapping[str, object]], first: Sequence[str]) -> None:
    """Write rows under the union of their keys, `first` first."""
    fields = list(dict.fromkeys([*first, *(key for row in rows for key in row)]))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
