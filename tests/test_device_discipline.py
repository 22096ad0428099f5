"""On a GPU nothing mixes devices, and the loops of training and recording wait for nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from planted import planted_layer, seeded
from pretended import DEVICE, OnDevice, PretendedDevice, on_device, values

from predictor.collection.recorder import measure_active, passes
from predictor.collection.row_maker import Layer, RowMaker
from predictor.module import Predictor, to_half
from predictor.size import Size
from predictor.thresholds.curves import measure_layer
from predictor.traces.device_rows import StreamedRows, resident
from predictor.traces.packing import pack_active, pack_codes
from predictor.traces.rows import LabelledRows, LayerWeights, ShardedRows
from predictor.traces.transfer import Beside
from predictor.training.layer import evaluate, train_layer
from predictor.training.loss import batches, set_gradients
from predictor.training.settings import DEJAVU, PSP, Recipe
from predictor.training.start import Starter, start_sample

CPU = torch.device("cpu")
TRAIN, HOLDOUT = torch.arange(2000), torch.arange(2000, 2400)
RANK = 32


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedDevice]:
    """A pretended GPU without streams of its own."""
    monkeypatch.setattr("predictor.traces.transfer.has_streams", lambda device: False)
    with PretendedDevice() as device:
        yield device


@pytest.fixture(params=["constant", "pairs"])
def planted(request: pytest.FixtureRequest) -> tuple[ShardedRows, LayerWeights]:
    return planted_layer(mean=8 if request.param == "constant" else 0.1)


def labelled(
    planted: tuple[ShardedRows, LayerWeights], recipe: Recipe, place: torch.device
) -> LabelledRows:
    rows = resident(planted[0].pieces, place)
    return LabelledRows(rows, planted[1], normalise=recipe.normalise)


def trained(
    rows: LabelledRows,
    recipe: Recipe,
    on_step: Callable[[int], object] = lambda steps: None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Predictor, list[Any]]:
    generator, epochs = seeded(), list[Any]()
    sample = start_sample(recipe, TRAIN, generator)
    start = Starter(recipe, rows, sample).at(Size("f16", RANK), generator)
    predictor = train_layer(
        start,
        rows,
        train=TRAIN,
        holdout=HOLDOUT,
        generator=generator,
        dtype=dtype,
        on_step=on_step,
        on_epoch=epochs.append,
    )
    return predictor, epochs


def waits_between_steps(
    device: PretendedDevice,
    rows: LabelledRows,
    recipe: Recipe,
    dtype: torch.dtype = torch.float32,
) -> tuple[Predictor, list[Any], list[Counter[str]]]:
    """Train, and return what the program waited for from each step to the next of its epoch."""
    seen: list[Counter[str]] = []
    predictor, epochs = trained(rows, recipe, lambda steps: seen.append(device.waits.copy()), dtype)
    steps = len(seen) // len(epochs)
    pairs = [
        (before, after)
        for number, (before, after) in enumerate(pairwise(seen), 1)
        if number % steps
    ]
    assert len(pairs) == len(epochs) * (steps - 1) > 10
    return predictor, epochs, [after - before for before, after in pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", [PSP, DEJAVU], ids=lambda recipe: recipe.name)
def test_no_step_of_training_waits_and_the_result_is_the_cpu_s(
    device: PretendedDevice,
    planted: tuple[ShardedRows, LayerWeights],
    recipe: Recipe,
    dtype: torch.dtype,
) -> None:
    recipe = replace(recipe, epochs=2, batch=128, stop_recall=1.1)
    rows = labelled(planted, recipe, DEVICE)
    assert isinstance(rows.rows.pieces[0].inputs, OnDevice)
    predictor, epochs, waits = waits_between_steps(device, rows, recipe, dtype)
    assert waits == [Counter()] * len(waits)
    assert not isinstance(predictor.fc1, OnDevice)
    expected, told = trained(labelled(planted, recipe, CPU), recipe, dtype=dtype)
    assert epochs == told
    for found, wanted in zip(predictor.parameters(), expected.parameters(), strict=True):
        # A GPU sorts by itself, the CPU by NumPy: what is between equal numbers may differ.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_measuring_mixes_nothing_and_gives_the_cpu_s_numbers(
    device: PretendedDevice, planted: tuple[ShardedRows, LayerWeights]
) -> None:
    predictor = to_half(trained(labelled(planted, PSP, CPU), PSP)[0])
    here, there = (labelled(planted, PSP, place) for place in (CPU, DEVICE))
    assert evaluate(predictor, there, HOLDOUT) == evaluate(predictor, here, HOLDOUT)
    found, wanted = (
        measure_layer(predictor, rows, TRAIN, HOLDOUT, seeded()).tensors() for rows in (there, here)
    )
    for name, table in wanted.items():
        assert not isinstance(found[name], OnDevice)
        assert torch.equal(found[name], table), name


def test_rows_that_are_streamed_arrive_without_a_wait_of_the_loop_s(
    device: PretendedDevice,
    planted: tuple[ShardedRows, LayerWeights],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Taken in this thread, the only one that pretends; what is waited for is the taking."""
    monkeypatch.setattr("predictor.traces.device_rows.made_ahead", map)
    rows = LabelledRows(StreamedRows(DEVICE, *planted[0].pieces), planted[1], normalise=True)
    recipe, order = replace(PSP, batch=100), torch.randperm(2000, generator=seeded())
    found = list(batches(recipe, rows, order, together=500))
    taking = device.waits.copy()
    assert set(taking) == {"aten::_to_copy", "aten::_local_scalar_dense"}
    assert max(taking.values()) == 4  # of as many parts
    wanted = batches(recipe, replace(rows, rows=planted[0]), order, together=500)
    for batch, plain in zip(found, wanted, strict=True):
        for name, value in vars(plain).items():
            ours = getattr(batch, name)
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(values(ours) if isinstance(ours, OnDevice) else ours, value), name


def test_rows_that_are_streamed_have_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stream keeps memory of its own: one for every call would fill the card."""
    made: list[torch.device] = []

    class Counted(Beside):
        def __init__(self, device: torch.device) -> None:
            made.append(device)
            super().__init__(device)

    monkeypatch.setattr("predictor.traces.device_rows.Beside", Counted)
    rows = StreamedRows(CPU, *planted_layer(mean=8)[0].pieces)
    for _ in range(3):
        (part,) = rows.parts(torch.arange(5), 8)
        assert len(part[1]) == 5
    assert made == [CPU]


def test_clipped_labels_wait_a_few_times_for_several_batches(
    device: PretendedDevice, planted: tuple[ShardedRows, LayerWeights]
) -> None:
    """How many labels are kept is known to the device alone: places by mask, and where rows end."""
    rows = replace(labelled(planted, PSP, DEVICE), top=9)
    before, recipe = device.waits.copy(), replace(PSP, batch=100)
    found = list(batches(recipe, rows, TRAIN, together=500))
    assert device.waits - before == Counter({"aten::index": 8, "aten::_to_copy": 8})
    plain = replace(labelled(planted, PSP, CPU), top=9)
    for batch, wanted in zip(found, batches(recipe, plain, TRAIN, together=500), strict=True):
        assert torch.equal(values(batch.places), wanted.places)
        assert torch.equal(values(batch.positive), wanted.positive)


# --- recording -----------------------------------------------------------------------------------


def made(bits: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    gate = torch.randn(6, 50, 109, generator=seeded()).relu().to(dtype)
    return {
        "residual": torch.randn(6, 50, 24, generator=seeded(1)).to(dtype),
        "gate": gate,
        "product": gate * torch.randn(gate.shape, generator=seeded(2)).to(dtype),
        "norms": torch.rand(109, generator=seeded(3)) + 0.5,
    }


@pytest.mark.parametrize("chosen", [None, torch.arange(0, 300, 3)])
@pytest.mark.parametrize("bits", [0, 2, 4, 8])
def test_recording_a_layer_waits_for_nothing(
    device: PretendedDevice,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    chosen: torch.Tensor | None,
) -> None:
    fetched: list[torch.Tensor] = []

    def fetch(tensor: torch.Tensor) -> torch.Tensor:
        fetched.append(tensor)
        return values(tensor).clone()

    monkeypatch.setattr("predictor.collection.row_maker.fetched", fetch)
    maker = RowMaker(DEVICE, lambda x: passes(x, 0.0), dtype=torch.float16, bits=bits)
    found = made(bits)
    there = {name: on_device(tensor) for name, tensor in found.items()}
    layer = Layer(
        residual=there["residual"],
        taps=[there["gate"]],
        product=there["product"],
        norms=there["norms"],
        chosen=None if chosen is None else on_device(chosen),
    )
    begun = maker.begin(layer)
    rows = maker.finish(begun)()
    assert not device.waits
    assert len(fetched) == 4 + 2 * bool(bits)

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.flatten(0, 1)
        return flat if chosen is None else flat[chosen]

    packed = pack_active(kept(found["gate"]) > 0)
    counts, scale, codes = measure_active(packed, kept(found["product"]), found["norms"], bits)
    assert torch.equal(rows.inputs, kept(found["residual"]).half())
    assert torch.equal(rows.active, packed)
    assert torch.equal(rows.counts, counts)
    assert torch.equal(rows.scale, scale)
    if bits:
        assert torch.equal(rows.codes, torch.from_numpy(pack_codes(codes.numpy(), bits)))


# --- what would be seen --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wait",
    [
        lambda loss: loss.cpu(),
        lambda loss: loss.item(),
        lambda loss: float(loss),
        lambda loss: loss.reshape(1).nonzero(),
        lambda loss: loss.reshape(1)[loss.reshape(1) > 0],
        lambda loss: loss.reshape(1).tolist(),
    ],
    ids=["cpu", "item", "float", "nonzero", "mask", "tolist"],
)
def test_a_planted_wait_is_seen(
    device: PretendedDevice,
    monkeypatch: pytest.MonkeyPatch,
    wait: Callable[[torch.Tensor], object],
) -> None:
    def waiting(*args: Any) -> torch.Tensor:
        loss = set_gradients(*args)
        wait(loss)
        return loss

    monkeypatch.setattr("predictor.training.layer.set_gradients", waiting)
    recipe = replace(PSP, batch=128)
    rows = labelled(planted_layer(mean=8), recipe, DEVICE)
    waits = waits_between_steps(device, rows, recipe)[2]
    assert all(sum(each.values()) >= 1 for each in waits)


def test_mixed_devices_are_seen(device: PretendedDevice) -> None:
    there = torch.ones(4, device="meta")
    assert isinstance(there, OnDevice)
    assert float((there * 2 + torch.tensor(1.0)).sum()) == 12
    with pytest.raises(AssertionError, match="mixes devices"):
        there + torch.ones(4)
    with pytest.raises(AssertionError, match="mixes devices"):
        there[torch.arange(2)]
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
