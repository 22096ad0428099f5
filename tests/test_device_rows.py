"""Rows in a device's memory, and those taken there part by part, are the rows of the files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from planted import seeded, starting_at

from common.errors import TraceError
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.module import to_half
from predictor.thresholds.curves import measure_layer
from predictor.traces.device_rows import StreamedRows, resident, rows_for
from predictor.traces.packing import (
    active_places,
    pack_active,
    true_places,
    unpack_active,
    unpack_on_device,
)
from predictor.traces.rows import LabelledRows, ShardedRows
from predictor.traces.store import TraceStore
from predictor.training.layer import evaluate, train_layer
from predictor.training.loss import Batch, batches
from predictor.training.settings import DEJAVU, PSP, Recipe

CPU = torch.device("cpu")
Place = Callable[[ShardedRows], ShardedRows]
PLACES: dict[str, Place] = {
    "resident": lambda rows: resident(rows.pieces, CPU),
    "streamed": lambda rows: StreamedRows(CPU, *rows.pieces),
}


@pytest.fixture(scope="module")
def sharded_traces(
    model_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> TraceStore:
    """Traces of several shards, whose importance ends within bytes."""
    out = tmp_path_factory.mktemp("sharded") / "traces"
    sizes: dict[str, Any] = {"tokens": 2000, "context": 63, "importance_bits": 2}
    run = CollectConfig(model=str(model_dir), data=str(data_file), out=out, shard_rows=500, **sizes)
    return collect(run)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    return PLACES[request.param]


@pytest.fixture(params=[0, 20])
def rows(request: pytest.FixtureRequest, sharded_traces: TraceStore) -> LabelledRows:
    """Rows of several shards, their labels cut or not."""
    layer = sharded_traces.layer(1)
    assert len(layer.pieces) > 1
    return LabelledRows(layer, sharded_traces.weights(1), normalise=True, top=request.param)


def placed(rows: LabelledRows, place: Place) -> LabelledRows:
    return replace(rows, rows=place(rows.rows))


@pytest.mark.parametrize("d_ff", [1, 8, 13, 112])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_bits_are_unpacked_and_found_as_on_the_cpu(d_ff: int, density: float) -> None:
    active = torch.rand(37, d_ff, generator=seeded()) < density
    packed = pack_active(active)
    assert torch.equal(unpack_on_device(packed, d_ff), unpack_active(packed, d_ff))
    row, neuron = active_places(packed)
    assert torch.equal(true_places(active, int(active.sum())), row * d_ff + neuron)


def test_everything_that_is_read_is_the_same(rows: LabelledRows, place: Place) -> None:
    index = torch.randperm(len(rows.rows), generator=seeded())[:777]
    whole = placed(rows, place)
    assert len(whole.rows) == len(rows.rows)
    parts = list(whole.parts(index, 100))
    assert [len(part) for _, part in parts] == [100] * 7 + [77]
    for (held, part), wanted in zip(parts, torch.split(index, 100), strict=True):
        for name in ("inputs", "active", "importance"):
            assert torch.equal(getattr(held, name)(part), getattr(rows, name)(wanted)), name
        for name, options in (("contributions", {}), ("positives", {"importance": True})):
            pairs = zip(
                getattr(held, name)(part, **options),
                getattr(rows, name)(wanted, **options),
                strict=True,
            )
            assert all(torch.equal(found, expected) for found, expected in pairs), name


@pytest.mark.parametrize("recipe", [PSP, DEJAVU], ids=lambda recipe: recipe.name)
def test_batches_are_the_same(rows: LabelledRows, place: Place, recipe: Recipe) -> None:
    order = torch.randperm(1500, generator=seeded(1))[:1001]
    recipe = replace(recipe, batch=100)

    def read(rows: LabelledRows) -> list[Batch]:
        return list(batches(recipe, rows, order, together=250))

    for found, expected in zip(read(placed(rows, place)), read(rows), strict=True):
        for name, value in vars(expected).items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(getattr(found, name), value), name


def test_training_and_measuring_are_the_same(rows: LabelledRows, place: Place) -> None:
    def made(rows: LabelledRows) -> list[Any]:
        generator, train, held = seeded(), torch.arange(1400), torch.arange(1400, 1900)
        start = starting_at(PSP, rows, train, generator)
        epochs: list[Any] = []
        trained = train_layer(
            start, rows, train=train, holdout=held, generator=generator, on_epoch=epochs.append
        )
        predictor = to_half(trained)
        curves = measure_layer(predictor, rows, train, held, seeded(1)).tensors()
        return [epochs, evaluate(predictor, rows, held), *predictor.parameters(), *curves.values()]

    for found, expected in zip(made(placed(rows, place)), made(rows), strict=True):
        if isinstance(expected, torch.Tensor):
            assert torch.equal(found, expected)
        else:
            assert found == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_refused(
    sharded_traces: TraceStore, place: Place, value: float
) -> None:
    pieces = list(sharded_traces.layer(1).pieces)
    spoilt = pieces[1].inputs.clone()
    spoilt[3, 5] = value
    pieces[1] = replace(pieces[1], inputs=spoilt, file=Path("spoilt"))
    with refused(TraceError, "spoilt: inputs hold NaN or inf", "psp traces check"):
        rows = place(ShardedRows(*pieces))
        list(rows.parts(torch.arange(len(rows)), 500))


def test_bits_that_contradict_the_counts_are_refused(sharded_traces: TraceStore) -> None:
    pieces = list(sharded_traces.layer(1).pieces)
    pieces[1] = replace(pieces[1], counts=pieces[1].counts + 1, file=Path("spoilt"))
    with refused(TraceError, "spoilt: counts differ from the active bits"):
        resident(pieces, CPU)


@pytest.mark.parametrize("row", [-1, 100_000])
def test_a_row_that_is_not_there_is_no_other_row(sharded_traces: TraceStore, row: int) -> None:
    rows = resident(sharded_traces.layer(1).pieces, CPU)
    with pytest.raises(IndexError, match=f"of {len(rows)}"):
        rows.inputs_at(torch.tensor([5, row, 7]))


@pytest.mark.parametrize(("free", "kind"), [(10**6, "StreamedRows"), (10**9, "ResidentRows")])
def test_rows_that_do_not_fit_are_streamed(
    sharded_traces: TraceStore, monkeypatch: pytest.MonkeyPatch, free: int, kind: str
) -> None:
    pieces = sharded_traces.layer(1).pieces
    monkeypatch.setattr("predictor.traces.device_rows.free_gpu_memory", lambda device: free)
    bare = [replace(piece, starts=torch.zeros(0, dtype=torch.int64)) for piece in pieces]
    assert type(rows_for(CPU, bare, lambda: pieces)).__name__ == kind
