"""The cost model against PowerInfer and llama.cpp on an H100.

`recorded/speed-h100.json` holds tokens/s of models of exactly known density
(benchmarks/gpu/hybrid.py), and where psp's plan, which PowerInfer followed to the byte, puts them.
The hardware is the preset with the machine's CPU, fitted as `psp estimate --calibrate` does to the
four runs without anything in VRAM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from cost_model.calibration import Run, calibrate
from cost_model.hardware import Hardware, load_hardware
from cost_model.model_bytes import Activity, LayerBytes, LayerPlace, ModelBytes, Place
from cost_model.roofline import dense_token, sparse_token

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "recorded" / "speed-h100.json").read_text()
)
DENSITY = 0.1
ACTIVITY = Activity(predicted=DENSITY, both=DENSITY, active=DENSITY)
POSITION = 39
"""Tokens in the cache: seven of the prompt and half of the 64 decoded."""


def model(name: str) -> ModelBytes:
    told = dict(RECORDED["models"][name])
    layers = (LayerBytes(**told.pop("layer")),) * told.pop("n_layers")
    return ModelBytes(layers=layers, **told)


def place(point: dict[str, Any]) -> Place:
    keys = ("attention", "fc1", "fc2", "neurons", "activations")
    layers = [
        LayerPlace(**dict(zip(keys, told, strict=True)))
        for count, *told in point["layers"]
        for _ in range(count)
    ]
    return Place(layers=tuple(layers), head=point["head"], kv=point["kv"])


def measured_alone() -> Iterator[Run]:
    """Yield the runs on the CPU alone, whose weights are F16."""
    points = [each for each in RECORDED["sparse"] if not each["budget"]]
    for point in points:
        yield run(point["model"], point["rounds"], sparse=True)
    for point in RECORDED["dense"]:
        if not point["n_gpu_layers"]:
            yield run(point["model"], point["powerinfer"], sparse=False)


def run(name: str, rounds: list[float], *, sparse: bool) -> Run:
    told = model(name)
    always = told.head + sum(each.attention + told.kv(POSITION) for each in told.layers)
    predictors = sum(each.predictor for each in told.layers)
    ffn = sum(each.ffn for each in told.layers)
    computed = DENSITY * ffn if sparse else 0
    return Run(
        name=f"{name}, {sparse}",
        group=name,
        seconds=1 / median(rounds),
        matrix=always + (predictors if sparse else ffn),
        rows=computed * 2 / 3,
        columns=computed / 3,
        layers=len(told.layers),
    )


@cache
def machine() -> Hardware:
    return calibrate(load_hardware("h100"), list(measured_alone()))


def sparse(point: dict[str, Any]) -> float:
    """Return the estimate, tokens/s."""
    told = model(point["model"])
    activities = [ACTIVITY] * len(told.layers)
    return sparse_token(told, place(point), machine(), activities, POSITION).tokens_per_second


def dense(point: dict[str, Any]) -> float:
    """Return the estimate, tokens/s."""
    told = model(point["model"])
    return dense_token(told, point["n_gpu_layers"], machine(), POSITION).tokens_per_second


def faster(point: dict[str, Any]) -> float:
    """Return tokens/s of the faster dense engine."""
    rounds: tuple[list[float], ...] = (point["powerinfer"], point["llama_cpp"])
    return max(map(median, rounds))


def title(point: dict[str, Any]) -> str:
    return f"{point['model']}, {point['budget']}, {point.get('choice', 'dense')}"


@pytest.mark.parametrize("point", RECORDED["sparse"], ids=title)
def test_speed_of_the_sparse_graph(point: dict[str, Any]) -> None:
    """Rounds of one point differ by up to a third of the lower one.

    Of Q4_0 the CPU reads fewer bytes a second than of F16, to which it was fitted.
    """
    low, high = (0.8, 1.4) if "Q4_0" in point["model"] else (0.85, 1.15)
    assert low < sparse(point) / median(point["rounds"]) < high


@pytest.mark.parametrize("point", RECORDED["dense"], ids=title)
def test_speed_of_the_faster_dense_engine(point: dict[str, Any]) -> None:
    low, high = (0.8, 1.9) if "Q4_0" in point["model"] else (0.85, 1.15)
    assert low < dense(point) / faster(point) < high


@pytest.mark.parametrize("name", RECORDED["models"])
def test_which_budget_is_faster(name: str) -> None:
    """Of any two whose speeds differ by more than a fifth, which is more than the estimates err."""
    points = [each for each in RECORDED["sparse"] if each["model"] == name]
    compared = 0
    for one, other in combinations(points, 2):
        slower, quicker = sorted((one, other), key=lambda point: median(point["rounds"]))
        if median(quicker["rounds"]) > 1.2 * median(slower["rounds"]):
            compared += 1
            assert sparse(quicker) > sparse(slower), (title(quicker), title(slower))
    assert compared


@pytest.mark.parametrize("point", RECORDED["dense"], ids=title)
def test_when_powerinfer_is_faster_than_a_dense_engine(point: dict[str, Any]) -> None:
    """It is wherever layers are left to the CPU, and is not where none is."""
    against = next(
        each
        for each in RECORDED["sparse"]
        if (each["model"], each["budget"]) == (point["model"], point["budget"])
    )
    wins = median(against["rounds"]) > faster(point)
    assert wins == (point["n_gpu_layers"] <= len(model(point["model"]).layers))
    assert (sparse(against) > dense(point)) == wins
