"""The results beside a benchmark, and what they share with it, checked while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from powerinfer_bridge.report.results import METRICS, Estimate, HotNeurons, Layer, Predictors
from powerinfer_bridge.report.values import Value


def read_metrics(value: Value) -> dict[str, float]:
    """Take the five metrics out of an object that holds them."""
    return {
        key: value[key].number(0) if key == "ffn_bytes_ratio" else value[key].share()
        for key in METRICS
    }


def read_layers(layers: Value) -> tuple[Layer, ...]:
    """Take the layers out of an array of objects."""
    return tuple(
        Layer(
            number=int(value["layer"].number(0)),
            rank=int(value["rank"].number(0)),
            metrics=read_metrics(value),
        )
        for value in layers.items()
    )


def read_estimate(value: Value) -> Estimate:
    """Take what is expected out of an estimate."""
    speeds = value["tokens_per_second"].entries()
    return Estimate(
        hardware=value["hardware"].text(),
        tokens_per_second={
            name: speed.positive() for name, speed in speeds.items() if speed.found is not None
        },
    )


def read_hot_neurons(
    neurons: list[Value], activations: list[Value], on_gpu: tuple[float, float] | None = None
) -> HotNeurons | None:
    """Make a curve of two arrays of equal length, None of empty ones."""
    if not neurons or not activations:
        return None
    if len(neurons) != len(activations):
        raise activations[-1].wrong(f"{len(neurons)} activation shares, one a neuron share")
    first, second = (tuple(each.share() for each in axis) for axis in (neurons, activations))
    return HotNeurons(curve=(first, second), on_gpu=on_gpu)


def check_speed(speed: Value) -> tuple[float, tuple[float, float]]:
    """Return a median and the quartiles about it."""
    median = speed["tokens_per_second"].positive()
    low, high = read_quartiles(speed["quartiles"])
    if not low <= median <= high:
        raise speed["quartiles"].wrong(f"quartiles about the median {median:g}")
    return median, (low, high)


def read_quartiles(value: Value) -> tuple[float, float]:
    """Return two numbers, the second not below the first."""
    ends = [each.number(0) for each in value.items()]
    if len(ends) != 2 or ends[0] > ends[1]:
        raise value.wrong("two numbers, ascending")
    return ends[0], ends[1]


def read_predictors(report: Value) -> Predictors:
    """Take what the page needs out of the `report.json` of `psp train-predictor`.

    Raises:
        ResultError: a key is missing or holds something else; the line names it.
    """
    layers = read_layers(report["layers"])
    if not layers:
        raise report["layers"].wrong("at least one layer")
    together = [row for row in report["hot_neurons"].items() if row["layer"].found == "all"]
    neurons, activations = (
        [row[f"{key}_share"] for row in together] for key in ("neuron", "activation")
    )
    tables = {"mean", "layers", "search", "curves", "hot_neurons"}
    return Predictors(
        model=report["model"].text(),
        layers=layers,
        points=tuple(
            (row["ffn_bytes_ratio"].number(0), gap.number(-1), row["chosen"].truth())
            for row in report["search"].items()
            if (gap := row.get("ppl_gap")) is not None
        ),
        hot=read_hot_neurons(neurons, activations),
        facts={key: value for key, value in report.found.items() if key not in tables},
    )


def read_density(result: Value) -> Mapping[str, Any]:
    """Check a result of the density benchmark and return it as it stands.

    Raises:
        ResultError: a key is missing or holds something else; the line names it.
    """
    for key in ("n_layers", "d_model", "d_ff", "rank"):
        result["shape"][key].number(0)
    result["threads"].number(1)
    points = result["points"].items()
    if not points:
        raise result["points"].wrong("at least one point")
    for point in points:
        point["density"].share()
        for arm in ("predicted", "all_neurons", "dense", "dense_llama_cpp"):
            if (speed := point.get(arm)) is not None:
                check_speed(speed)
        if (estimate := point.get("estimate")) is not None:
            for speed in estimate.entries().values():
                if speed.found is not None:
                    speed.positive()
    found: Mapping[str, Any] = result.found
    return found
