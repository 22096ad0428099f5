"""Rows gathered across shards: the same values as from one piece, without holding the layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NARROW_D_FF, SHARD_ROWS, refused
from recollected import recommit

from common.errors import TraceError
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.traces.rows import LabelledRows, LayerRows, LayerWeights, ShardedRows, normalise_rms
from predictor.traces.store import TraceStore

ROWS, D_MODEL, D_FF = 3000, 64, NARROW_D_FF
INDICES: dict[str, Callable[[torch.Generator], torch.Tensor]] = {
    "shuffled": lambda g: torch.randperm(ROWS, generator=g)[:400],
    "ascending": lambda g: torch.arange(0, ROWS, 11),
    "descending": lambda g: torch.arange(ROWS - 1, -1, -13),
    "with repeats": lambda g: torch.randint(ROWS, (300,), generator=g),
    "one shard": lambda g: 1030 + torch.randperm(64, generator=g),
    "one row": lambda g: torch.tensor([ROWS - 1]),
    "none": lambda g: torch.zeros(0, dtype=torch.int64),
}


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def stores(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    narrow_model: Path,
    long_data: Path,
) -> dict[int, TraceStore]:
    """Return stores of three shards or more by their bits of importance."""
    made = {}
    for bits in (2, 4, 8):
        run = CollectConfig(
            model=str(narrow_model),
            data=str(long_data),
            out=tmp_path_factory.mktemp("s") / "s",
            field="body",
            tokens=ROWS,
            context=100,
            dtype=request.param,
            importance_bits=bits,
            shard_rows=SHARD_ROWS,
        )
        made[bits] = collect(run)
    return made


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def in_one_piece(sharded: ShardedRows) -> LayerRows:
    """Copy all rows into one piece."""
    starts, code_bytes = [], 0
    for piece in sharded.pieces:
        starts.append(piece.starts + code_bytes * 8 // piece.importance_bits)
        code_bytes += len(piece.importance)

    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(piece, name) for piece in sharded.pieces])

    return replace(
        sharded.pieces[0],
        inputs=joined("inputs"),
        active=joined("active"),
        counts=sharded.counts,
        scale=joined("scale"),
        starts=torch.cat(starts),
        importance=joined("importance"),
    )


# --- gathering -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", INDICES)
def test_rows_across_shards_are_those_of_one_piece(
    stores: dict[int, TraceStore], bits: int, kind: str
) -> None:
    index, store = INDICES[kind](seeded()), stores[bits]
    sharded, weights = store.layer(1), store.weights(1)
    assert len(sharded.pieces) >= 3
    assert len(sharded) == ROWS
    whole = in_one_piece(sharded)
    assert torch.equal(sharded.inputs_at(index), whole.inputs[index].float())
    assert torch.equal(sharded.active_at(index), whole.active[index])
    assert torch.equal(sharded.scale_at(index), whole.scale[index])
    for normalise in (False, True):
        options: dict[str, Any] = {"normalise": normalise, "top": 9}
        ours, plain = (
            LabelledRows(sharded, weights, **options),
            LabelledRows(ShardedRows(whole), weights, **options),
        )
        for name in ("inputs", "active", "importance"):
            found, expected = getattr(ours, name)(index), getattr(plain, name)(index)
            assert found.shape == expected.shape
            assert torch.equal(found, expected), name
        for found, expected in zip(
            (*ours.positives(index, importance=True), *ours.contributions(index)),
            (*plain.positives(index, importance=True), *plain.contributions(index)),
            strict=True,
        ):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_read_row_by_row(stores: dict[int, TraceStore], bits: int) -> None:
    """Against the bytes of each shard file, unpacked bit by bit."""
    sharded = stores[bits].layer(0)
    index = torch.randint(ROWS, (200,), generator=seeded(1))
    expected, first = {}, 0
    for piece in sharded.pieces:
        stream = [
            byte >> at & (1 << bits) - 1
            for byte in piece.importance.tolist()
            for at in range(0, 8, bits)
        ]
        place = 0
        for row in range(len(piece.inputs)):
            count = sum(byte.bit_count() for byte in piece.active[row].tolist())
            expected[first + row] = stream[place : place + count]
            place += count
        first += len(piece.inputs)
    counts = torch.tensor([len(expected[row]) for row in index.tolist()])
    found = sharded.codes_at(index, counts)
    assert found.tolist() == [code for row in index.tolist() for code in expected[row]]


@pytest.mark.parametrize("row", [-1, ROWS, ROWS + 5000])
def test_a_row_that_is_not_there_is_no_other_row(stores: dict[int, TraceStore], row: int) -> None:
    sharded = stores[2].layer(0)
    with pytest.raises(IndexError, match=f"of {ROWS}"):
        sharded.inputs_at(torch.tensor([5, row, 7]))


def test_opening_a_layer_and_gathering_a_batch_copies_no_other_rows(
    stores: dict[int, TraceStore],
) -> None:
    """Shards stay mapped: their tensors' memory is that of the files."""
    store = stores[2]
    sharded = store.layer(0)
    rows = LabelledRows(sharded, store.weights(0), normalise=True)
    rows.inputs(torch.arange(10)), rows.importance(torch.arange(10))
    mapped = mapped_ranges(store.path)
    for piece in sharded.pieces:
        for tensor in (piece.inputs, piece.active, piece.scale, piece.importance):
            start = tensor.data_ptr()
            assert any(low <= start < high for low, high in mapped)


def mapped_ranges(path: Path) -> list[tuple[int, int]]:
    """Return the addresses at which this process has mapped files below a directory."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1].startswith(f"{path}/")]
    return [(int(low, 16), int(high, 16)) for low, high in spans]


# --- the residual stream -------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
def test_contributions_are_relative_to_raw_inputs(
    stores: dict[int, TraceStore], normalise: bool
) -> None:
    store, index = stores[8], torch.randperm(ROWS, generator=seeded(3))[:300]
    rows = LabelledRows(store.layer(1), store.weights(1), normalise=normalise)
    raw = in_one_piece(store.layer(1)).inputs[index].float()
    assert torch.equal(rows.inputs(index), normalise_rms(raw) if normalise else raw)
    squares = raw.double().square().sum(1)
    assert float(squares.std() / squares.mean()) > 0.01
    expected = rows.importance(index).double().square() / squares[:, None]
    places, found = rows.contributions(index)
    assert torch.equal(places, rows.active(index).flatten().nonzero()[:, 0])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.flatten()[places], rtol=1e-5, atol=0)


def test_a_row_of_zeros_has_finite_contributions(stores: dict[int, TraceStore]) -> None:
    piece = stores[8].layer(0).pieces[0]
    still = replace(piece, inputs=torch.zeros_like(piece.inputs))
    weights = LayerWeights(torch.zeros(D_FF, D_MODEL), torch.ones(D_FF))
    rows = LabelledRows(ShardedRows(still), weights, normalise=True)
    contributions = rows.contributions(torch.arange(50))[1]
    assert len(contributions) > 0
    assert torch.isfinite(contributions).all()


# --- damage --------------------------------------------------------------------------------------


def damaged(
    store: TraceStore, copy: Path, shard: int, change: Callable[[dict[str, torch.Tensor]], object]
) -> Path:
    """Copy a store and change one shard of layer 0 in the copy."""
    shutil.copytree(store.path, copy)
    file = copy / "layer-00" / f"shard-{shard:05d}.safetensors"
    recommit(copy, lambda each, tensors: change(tensors) if each == file else None)
    return file


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_no_numbers_are_refused_where_they_are_used(
    stores: dict[int, TraceStore], tmp_path: Path, value: float, normalise: bool
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["inputs"][3, 17] = value

    file = damaged(stores[2], tmp_path / "copy", 1, spoil)
    store = TraceStore.open(tmp_path / "copy")
    rows = LabelledRows(store.layer(0), store.weights(0), normalise=normalise)
    row = store.progress.shards[0].rows + 3
    others = torch.tensor([n for n in range(ROWS) if n != row])
    assert torch.isfinite(rows.inputs(others)).all()
    bad = torch.tensor([ROWS - 1, 5, row, row - 1])
    for use in (rows.inputs, rows.rows.inputs_at, rows.contributions):
        with refused(TraceError, str(file), "NaN or inf", "psp traces check", "collect"):
            use(bad)


def test_infinities_of_both_signs_do_not_cancel(stores: dict[int, TraceStore]) -> None:
    piece = stores[2].layer(0).pieces[0]
    inputs = piece.inputs.clone()
    inputs[3, 0], inputs[3, 1] = float("inf"), -float("inf")
    with refused(TraceError, "NaN or inf"):
        ShardedRows(replace(piece, inputs=inputs)).inputs_at(torch.arange(8))


def test_large_numbers_whose_sum_overflows_are_no_damage(stores: dict[int, TraceStore]) -> None:
    piece = stores[2].layer(0).pieces[0]
    large = torch.full(piece.inputs.shape, 3e38, dtype=torch.bfloat16)
    rows = ShardedRows(replace(piece, inputs=large))
    assert torch.equal(rows.inputs_at(torch.arange(8)), large[:8].float())


def test_active_bits_that_contradict_the_counts_are_refused(
    stores: dict[int, TraceStore], tmp_path: Path
) -> None:
    """Their codes would be read from a wrong place, or beyond the file."""
    file = damaged(stores[2], tmp_path / "copy", 2, lambda t: t["active"][4].fill_(255))
    with refused(TraceError, str(file), "counts differ from the active bits", "again"):
        TraceStore.open(tmp_path / "copy").layer(0)
