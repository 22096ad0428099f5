"""How many neurons each layer computes: told by the user, or measured by a benchmark."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from common.errors import EngineError
from common.files import read_json
from cost_model.model_bytes import Activity

BENCH_FILE = "bench.json"
_LARGEST = sys.float_info.max
_REMEDY = "pass a bench.json of psp bench-powerinfer --json, or --density"


@dataclass(frozen=True)
class ActivitySource:
    """Where a model's activity comes from.

    Attributes:
        layers: activity by layer.
        text: the source, for readers.
        assumptions: what was taken for granted, a line each.
    """

    layers: tuple[Activity, ...]
    text: str
    assumptions: tuple[str, ...] = ()


def stated_activity(
    n_layers: int, density: float, precision: float | None, active: float | None
) -> ActivitySource:
    """Return the same activity for every layer.

    Args:
        n_layers: layers.
        density: share of neurons that the predictor lets through.
        precision: share of those that are active; None assumes all.
        active: share of all neurons that are active; None assumes that none is missed.

    Raises:
        EngineError: shares that contradict each other.
    """
    assumptions = []
    if precision is None:
        precision = 1.0
        assumptions.append("every predicted neuron is active, so that down reads all of them")
    both = density * precision
    if active is None:
        active = both
        assumptions.append("no active neuron is missed, so that with all neurons down reads as few")
    if active < both:
        raise EngineError(
            f"--active {active:g} is less than density · precision = {both:g}",
            "raise it or lower --precision",
        )
    activity = Activity(predicted=density, both=both, active=active)
    return ActivitySource((activity,) * n_layers, f"--density {density:g}", tuple(assumptions))


def bench_activity(bench: Path | Mapping[str, Any], n_layers: int) -> ActivitySource:
    """Return what a benchmark measured, layer by layer.

    Args:
        bench: bench.json, the directory that holds it, or its document.
        n_layers: layers of the model.

    Raises:
        EngineError: no such file, or not one of this model.
    """
    if isinstance(bench, Path):
        file, document = read_bench(bench)
    else:
        file, document = Path(BENCH_FILE), dict(bench)
    return ActivitySource(layer_activity(file, document, n_layers), str(file))


def read_bench(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return a bench.json and where it lies."""
    file = path / BENCH_FILE if path.is_dir() else path
    return file, read_json(file, EngineError, _REMEDY)


def layer_activity(file: Path, document: Mapping[str, Any], n_layers: int) -> tuple[Activity, ...]:
    """Return the activity of a benchmark's layers."""
    layers = document.get("layers")
    if not isinstance(layers, list) or len(layers) != n_layers:
        found = len(layers) if isinstance(layers, list) else "no"
        raise EngineError(f"{file}: {found} layers, the model has {n_layers}", _REMEDY)
    return tuple(_activity(file, number, layer) for number, layer in enumerate(layers))


def _activity(file: Path, number: int, layer: Any) -> Activity:
    if not isinstance(layer, dict):
        raise EngineError(f"{file}: layers[{number}] is no object", _REMEDY)

    def share(key: str) -> float:
        value = layer.get(key)
        found = float(value) if _plain(value) else -1.0
        if not 0 <= found <= 1:
            where, shown = f"{file}: layers[{number}].{key}", f"{value!r:.40}"
            raise EngineError(f"{where} is {shown}, expected a share from 0 to 1", _REMEDY)
        return found

    predicted = 1 - share("predicted_sparsity")
    # Of no predicted neuron there is no precision.
    both = predicted * share("precision") if predicted else 0.0
    return Activity(
        predicted=predicted, both=both, active=max(both, 1 - share("activation_sparsity"))
    )


def number_at(document: Any, *keys: str) -> float | None:
    """Return a number above 0 of a nested document, None where there is none."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return float(document) if _plain(document) and document > 0 else None


def _plain(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a number that a float can hold, as JSON's may be NaN or 5000 digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_LARGEST < value < _LARGEST
