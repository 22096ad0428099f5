"""The report on a model's predictors: numbers as JSON and CSV, and plots.

Layout of a directory::

    report.json                       everything below
    layers.csv                        one row a layer: its metrics
    curves.csv                        one row a layer and threshold of the sweep
    search.csv                        one row a point that the search explored
    hot_neurons.csv                   one row a layer and share of hottest neurons
    layers.png  curves.png            the same as plots, each as SVG too
    search.png  hot_neurons.png
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.decisions import mean_metrics
from common.errors import PredictorError
from common.files import atomic_directory, refuse_existing, write_json
from common.version import tool_version
from predictor.artifact import PredictorArtifact
from predictor.module import PredictorType
from predictor.reporting.metrics import (
    LayerMeasurement,
    hot_neuron_curve,
    measure_predictor,
    sample_rows,
)
from predictor.traces.rows import LabelledRows
from predictor.traces.store import TraceStore

SCHEMA_VERSION = 1
_CURVE = ("threshold", "chosen", "density", "recall", "missed_importance", "ffn_output_error")
_POINT = ("ffn_bytes_ratio", "ppl_gap", "price", "chosen", "ranks")

Row = dict[str, Any]


def report_predictors(
    out: Path,
    store: TraceStore,
    artifact: PredictorArtifact,
    *,
    facts: Mapping[str, Any] | None = None,
    predictor_type: str = "f16",
    force: bool = False,
) -> Row:
    """Measure the finished layers of an artifact on its held-out documents and write the report.

    Args:
        out: directory to make.
        store: the traces that the artifact was trained from.
        artifact: the predictors.
        facts: more to say in `report.json`.
        predictor_type: element type that will be exported.
        force: replace an older report.

    Returns:
        The document of `report.json`.

    Raises:
        PspError: traces of another collection, no finished layer in them, or existing output.
    """
    refuse_existing(out, force=force, marker="report.json")
    measured = measure_predictors(store, artifact, PredictorType(predictor_type))
    header = artifact.header
    known = {
        "model": header.model,
        "recipe": header.recipe,
        "threshold": header.threshold,
        "held_out_tokens": int(store.holdout(header.holdout, header.seed).sum()),
        "average_precision_tokens": sample_rows(header.d_ff),
        "predictor_type": predictor_type,
    }
    known |= dict(facts or {})
    return write_report(out, measured, points=artifact.search, facts=known, force=force)


def measure_predictors(
    store: TraceStore, artifact: PredictorArtifact, element: PredictorType
) -> list[LayerMeasurement]:
    """Measure every finished layer that the traces hold, one in memory at a time.

    Raises:
        PspError: see `report_predictors`.
    """
    header = artifact.header
    if header.traces_identity != store.identity:
        raise PredictorError(
            f"{artifact.path}: was trained from other traces than {store.path}", "pass those"
        )
    layers = [layer for layer in store.header.layers if layer in artifact.layers]
    if not layers:
        raise PredictorError(
            f"{artifact.path}: holds no finished layer of {store.path}", "train one first"
        )
    held = store.holdout(header.holdout, header.seed).nonzero()[:, 0]

    def width(layer: int) -> float:
        rank = artifact.rank(layer)
        return element.width * element.stored_rank(rank) / rank

    return [
        measure_predictor(
            LabelledRows(store.layer(layer), store.weights(layer), normalise=False),
            held,
            artifact.layer(layer),
            layer=layer,
            threshold=header.threshold,
            ffn_matrices=store.header.ffn_matrices,
            predictor_width=width(layer),
            seed=header.seed,
        )
        for layer in tqdm(layers, unit="layer", desc="report", disable=None)
    ]


def write_report(
    out: Path,
    layers: Sequence[LayerMeasurement],
    *,
    points: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Row:
    """Write the report, whole or not at all.

    Args:
        out: directory to make.
        layers: at least one measured layer.
        points: what the search explored: `ffn_bytes_ratio`, `ppl_gap` (None if not measured),
            `chosen`, and whatever else it knows.
        facts: what else `report.json` should say, first.
        force: replace an older report.

    Returns:
        The document of `report.json`.

    Raises:
        OutputError: `out` exists and may not be replaced, or cannot be written.
    """
    from predictor.reporting.plots import draw

    refuse_existing(out, force=force, marker="report.json")
    search = [_finite(point) for point in points]
    document = {
        "schema_version": SCHEMA_VERSION,
        "tool_version": tool_version(),
        **_finite(facts or {}),
        "mean": mean_metrics([layer.metrics for layer in layers]),
        "layers": [_layer_row(layer) for layer in layers],
        "search": search,
        "curves": [row for layer in layers for row in _curve_rows(layer)],
        "hot_neurons": _hot_rows(layers),
    }
    with atomic_directory(out) as part:
        write_json(part / "report.json", document)
        for name in ("layers", "curves", "search", "hot_neurons"):
            _write_csv(part / f"{name}.csv", document[name], _POINT if name == "search" else ())
        draw(part, layers, search)
    return document


def _layer_row(layer: LayerMeasurement) -> Row:
    return {"layer": layer.layer, "rank": layer.rank, **layer.metrics}


def _curve_rows(layer: LayerMeasurement) -> list[Row]:
    """Return one row a threshold, without the runs at both ends under which nothing changes."""
    curve = layer.curve
    names = [name for name in _CURVE if name != "chosen"]
    columns = {
        "threshold": curve.thresholds,
        "density": curve.density,
        "recall": curve.recall,
        "missed_importance": curve.missed_importance,
        "ffn_output_error": curve.ffn_output_error,
    }
    changes = curve.predicted.diff().nonzero()[:, 0].tolist() or [layer.chosen]
    first, last = min(changes[0], layer.chosen), max(changes[-1] + 1, layer.chosen)
    kept = [(name, values.tolist()) for name in names if (values := columns[name]) is not None]
    return [
        {"layer": layer.layer, "chosen": position == layer.chosen}
        | {name: values[position] for name, values in kept}
        for position in range(first, min(last, len(curve.thresholds) - 1) + 1)
    ]


def _hot_rows(layers: Sequence[LayerMeasurement]) -> list[Row]:
    """Return a row a share, for every layer that has activations and for all together."""
    counts: dict[int | str, torch.Tensor] = {
        layer.layer: layer.activation_counts for layer in layers
    }
    counts["all"] = torch.stack(list(counts.values()))
    return [
        {"layer": name, "neuron_share": neurons, "activation_share": activations}
        for name, values in counts.items()
        if (curve := hot_neuron_curve(values)) is not None
        for neurons, activations in zip(curve[0].tolist(), curve[1].tolist(), strict=True)
    ]


def _finite(facts: Mapping[str, Any]) -> Row:
    """Copy with None for numbers that JSON does not have."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in facts.items()
    }


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]], first: Sequence[str]) -> None:
    """Write rows under the union of their keys, `first` first; lists are joined by spaces."""
    fields = list(dict.fromkeys([*first, *(key for row in rows for key in row)]))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
