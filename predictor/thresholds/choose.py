"""The last step of training: thresholds for every neuron at the price that a bound allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite

import torch

from common.typed_json import parse, plain
from predictor.artifact import PredictorArtifact
from predictor.module import Predictor, PredictorType
from predictor.thresholds.curves import (
    Curves,
    OperatingPoint,
    fold,
    mean_positive,
    trace_curves,
)
from predictor.thresholds.predicted_model import PredictedModel, Quality
from predictor.thresholds.search import Bound, Priced, price_for_bytes, price_for_gap
from predictor.traces.rows import LabelledRows
from results.predictors import SearchPoint

_CURVE_ROWS = 65536
"""Training rows that thresholds are chosen on, at most."""


@dataclass(frozen=True)
class LayerCurves:
    """A layer's curves on training rows, by which thresholds are chosen, and on held-out rows.

    Attributes:
        train: on training rows.
        holdout: on held-out rows, by which metrics are told.
        active: active neurons of all held-out rows.
    """

    train: Curves
    holdout: Curves
    active: int

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return them for a file."""
        tables: dict[str, torch.Tensor] = {"thresholds": self.train.thresholds}
        for name, curves in (("train", self.train), ("holdout", self.holdout)):
            tables |= {f"{name}.{part}": getattr(curves, part) for part in _PARTS}
            tables[f"{name}.rows"] = torch.tensor(curves.rows)
        return tables | {"active": torch.tensor(self.active)}

    @classmethod
    def read(cls, tables: Mapping[str, torch.Tensor]) -> LayerCurves:
        """Return what `tensors` gave."""

        def curves(name: str) -> Curves:
            parts = {part: tables[f"{name}.{part}"] for part in _PARTS}
            rows = int(tables[f"{name}.rows"])
            return Curves(thresholds=tables["thresholds"], rows=rows, **parts)

        return cls(curves("train"), curves("holdout"), int(tables["active"]))


_PARTS = ("computed", "hits", "missed")


def measure_layer(
    predictor: Predictor,
    rows: LabelledRows,
    train: torch.Tensor,
    holdout: torch.Tensor,
    generator: torch.Generator,
) -> LayerCurves:
    """Measure a trained predictor, rounded to float16, at all thresholds."""
    sample = train[torch.randperm(len(train), generator=generator)[:_CURVE_ROWS]]
    scale = mean_positive(predictor, rows, sample)
    held = trace_curves(predictor, rows, holdout, scale)
    active = sum(int(rows.active(part).sum()) for part in torch.split(holdout, 2048))
    return LayerCurves(trace_curves(predictor, rows, sample, scale), held, active)


def choose_thresholds(
    artifact: PredictorArtifact,
    bound: Bound,
    stored: PredictorType,
    ffn_matrices: int,
    open_model: Callable[[], PredictedModel],
) -> None:
    """Choose the thresholds of all layers, store them with their metrics and what was tried.

    Args:
        artifact: complete, with curves.
        bound: what to keep to.
        stored: type that predictors will be exported in.
        ffn_matrices: matrices of an FFN.
        open_model: loads the model; called only to keep to a gap.

    Raises:
        PredictorError: the bound is out of reach; layers stay as they were.
    """
    header = artifact.header
    layers = {n: LayerCurves.read(artifact.curves(n)) for n in range(header.n_layers)}
    curves = {n: layer.train for n, layer in layers.items()}
    sizes = {"d_model": header.d_model, "d_ff": header.d_ff, "ffn_matrices": ffn_matrices}
    costs = {n: stored.relative(artifact.rank(n), **sizes) for n in layers}
    if bound.ffn_bytes is not None:
        chosen, points = price_for_bytes(curves, costs, bound.ffn_bytes)
    else:
        assert bound.max_ppl_gap is not None
        model = open_model()

        def measure(priced: Priced) -> Quality:
            return model.quality(folded(artifact, priced.points), float(priced.sign))

        chosen, points = price_for_gap(curves, costs, bound.max_ppl_gap, measure)
    for n, point in chosen.points.items():
        counts = layers[n].holdout.counts(point.steps, layers[n].active)
        rank = stored.stored_rank(artifact.rank(n))
        metrics = counts.metrics(rank=rank, predictor_width=stored.width, **sizes)
        error = layers[n].holdout.choose(point.steps).error
        artifact.layers[n] = {**metrics, "ffn_output_error": error}
    artifact.search = [_finite(point) for point in points]
    thresholds = {n: point.thresholds for n, point in chosen.points.items()}
    artifact.set_thresholds(thresholds, chosen.sign)


def _finite(point: SearchPoint) -> SearchPoint:
    """Return a point without numbers that JSON does not have."""
    lost = {k: None for k, v in vars(point).items() if isinstance(v, float) and not isfinite(v)}
    return parse(SearchPoint, plain(point) | lost)


def folded(
    artifact: PredictorArtifact, points: Mapping[int, OperatingPoint]
) -> dict[int, Predictor]:
    """Return every layer's predictor with the thresholds of an operating point folded in."""
    predictors = {}
    for n, point in points.items():
        layer = artifact.layer(n, folded=False)
        predictors[n] = fold(Predictor(layer.fc1.float(), layer.fc2.float()), point.thresholds)
    return predictors
