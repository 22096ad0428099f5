"""Rows, training and recording on a real GPU: the CPU's results, and no wait that torch can see."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import planted_layer, seeded

from predictor.collection.collect import collect
from predictor.collection.recorder import measure_active, passes
from predictor.collection.row_maker import Layer, RowMaker
from predictor.collection.settings import CollectConfig
from predictor.module import to_half
from predictor.optimiser import AdamW
from predictor.size import Size
from predictor.thresholds.curves import measure_layer
from predictor.traces.device_rows import ResidentRows, StreamedRows, resident
from predictor.traces.packing import codes_at, pack_active, unpack_active
from predictor.traces.rows import LabelledRows, LayerWeights, ShardedRows
from predictor.traces.store import TraceStore
from predictor.training.layer import evaluate, train_layer
from predictor.training.loss import batches, set_gradients
from predictor.training.settings import PSP
from predictor.training.start import Starter, start_sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")
TRAIN, HOLDOUT = torch.arange(2400), torch.arange(2400, 3000)
Planted = tuple[ShardedRows, LayerWeights]


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_layer(mean=8)


@pytest.fixture(params=["resident", "streamed"])
def place(request: pytest.FixtureRequest) -> Callable[[ShardedRows], ShardedRows]:
    if request.param == "resident":
        return lambda rows: resident(rows.pieces, CUDA)
    return lambda rows: StreamedRows(CUDA, *rows.pieces)


@contextmanager
def refusing_waits() -> Iterator[None]:
    """Let torch raise where it would wait for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may not see all
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-6)


def test_a_planted_wait_is_refused() -> None:
    with refusing_waits(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(3, device=CUDA).sum().item()


def test_what_is_read_is_the_cpu_s(
    planted: Planted, place: Callable[[ShardedRows], ShardedRows]
) -> None:
    rows = LabelledRows(place(planted[0]), planted[1], normalise=True)
    plain = replace(rows, rows=planted[0])
    index = torch.randperm(3000, generator=seeded())[:777]
    for (held, part), wanted in zip(rows.parts(index, 100), torch.split(index, 100), strict=True):
        assert held.inputs(part).device.type == "cuda"
        assert torch.equal(held.active(part).cpu(), plain.active(wanted))
        close(held.inputs(part), plain.inputs(wanted))
        close(held.importance(part), plain.importance(wanted))
        for found, expected in zip(
            (*held.contributions(part), *held.positives(part, importance=True)),
            (*plain.contributions(wanted), *plain.positives(wanted, importance=True)),
            strict=True,
        ):
            close(found, expected)


def test_training_waits_for_nothing(planted: Planted) -> None:
    rows = LabelledRows(resident(planted[0].pieces, CUDA), planted[1], normalise=True)
    generator, recipe = seeded(), replace(PSP, batch=128)
    start = Starter(recipe, rows, start_sample(recipe, TRAIN, generator)).at(
        Size("f16", 32), generator
    )
    optimiser = AdamW([(each, 1e-3) for each in start.predictor.parameters()], fused=True)

    def epoch() -> None:
        for batch in batches(recipe, rows, TRAIN):
            set_gradients(start.predictor, batch, torch.bfloat16, start.coordinates)
            optimiser.step()

    epoch()  # the optimiser's state is made
    with refusing_waits():
        epoch()


def test_a_layer_comes_out_as_on_the_cpu(
    planted: Planted, place: Callable[[ShardedRows], ShardedRows]
) -> None:
    def made(rows: ShardedRows) -> tuple[Any, Any]:
        labelled, generator = LabelledRows(rows, planted[1], normalise=True), seeded()
        start = Starter(PSP, labelled, start_sample(PSP, TRAIN, generator)).at(
            Size("f16", 32), generator
        )
        trained = train_layer(
            start,
            labelled,
            train=TRAIN,
            holdout=HOLDOUT,
            generator=generator,
            on_epoch=lambda epoch: None,
        )
        predictor = to_half(trained)
        curves = measure_layer(predictor, labelled, TRAIN, HOLDOUT, seeded())
        return evaluate(predictor, labelled, HOLDOUT), curves

    (ours, our_curves), (theirs, their_curves) = made(place(planted[0])), made(planted[0])
    assert ours.decisions == theirs.decisions
    assert ours.active == theirs.active
    assert ours.hits == pytest.approx(theirs.hits, rel=0.02)
    assert ours.predicted == pytest.approx(theirs.predicted, rel=0.02)
    assert not our_curves.holdout.missed.is_cuda
    for name in ("computed", "hits"):
        found, wanted = (getattr(c.holdout, name) for c in (our_curves, their_curves))
        assert float((found - wanted).abs().mean()) < 0.01, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [0, 2, 8])
@pytest.mark.parametrize("padded", [False, True])
def test_recording_a_layer_waits_for_nothing(dtype: torch.dtype, bits: int, padded: bool) -> None:
    gate = torch.randn(4, 100, 1009, generator=seeded()).sub(1).relu().to(dtype)
    product = gate * torch.randn(gate.shape, generator=seeded(1)).to(dtype)
    residual, norms = torch.randn(4, 100, 64).to(dtype), torch.rand(1009) + 0.5
    chosen = torch.arange(0, 400, 3) if padded else None
    layer = Layer(
        residual=residual.to(CUDA),
        taps=[gate.to(CUDA)],
        product=product.to(CUDA),
        norms=norms.to(CUDA),
        chosen=None if chosen is None else chosen.to(CUDA),
    )
    maker = RowMaker(CUDA, lambda x: passes(x, 0.0), dtype=torch.bfloat16, bits=bits)
    with refusing_waits():
        begun = maker.begin(layer)
        begun.ready.wait()
        rows = maker.finish(begun)()

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.flatten(0, 1)
        return flat if chosen is None else flat[chosen]

    packed = pack_active(kept(gate) > 0)
    counts, scale, codes = measure_active(packed, kept(product), norms, bits)
    assert rows.inputs.is_pinned()
    assert torch.equal(rows.inputs, kept(residual).to(torch.bfloat16))
    assert torch.equal(rows.active, packed)
    assert torch.equal(rows.counts, counts)
    if bits:
        close(rows.scale, scale)
        ours = codes_at(rows.codes, torch.arange(len(codes)), bits)
        assert float((ours != codes).float().mean()) < 1e-3


def test_a_collection_is_whole_and_says_what_the_cpu_s_does(
    model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    def collected(device: str) -> TraceStore:
        run = CollectConfig(
            model=str(model_dir),
            data=str(data_file),
            out=tmp_path / device,
            tokens=1500,
            context=63,
            shard_rows=400,
            batch=3,
            device=device,
        )
        return collect(run)

    ours, theirs = collected("cuda"), collected("cpu")
    ours.check()
    assert [s.segments for s in ours.progress.shards] == [
        s.segments for s in theirs.progress.shards
    ]
    index = torch.arange(ours.rows)
    for layer in ours.header.layers:
        rows = [store.layer(layer) for store in (ours, theirs)]
        bits = [unpack_active(each.active_at(index), ours.header.d_ff) for each in rows]
        assert float((bits[0] != bits[1]).float().mean()) < 0.01
        assert isinstance(ours.layer(layer, CUDA), ResidentRows)
