"""Training of one layer of LLaMA-7B's shape: how long each part takes, and how busy the card is.

The traces are made on the card, by what records a model there: inputs around a mean, a gate of low
rank beneath noise, 88 % of the neurons closed. They are a real store, in memory if that is there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.gpu.kit import Figure, Kit, Step
from benchmarks.gpu.profiling import watch
from benchmarks.training import NOISE, documents, header, planted_layer
from common.element_types import F16
from predictor.collection.row_maker import Layer, RowMaker
from predictor.collection.writing import Meanwhile
from predictor.module import to_half
from predictor.size import Size
from predictor.thresholds.curves import measure_layer
from predictor.traces.device_rows import StreamedRows
from predictor.traces.rows import LabelledRows, LayerWeights
from predictor.traces.store import TraceStore
from predictor.training.layer import LayerResult, LayerTrainer, evaluate, train_layer
from predictor.training.settings import TrainConfig
from predictor.training.start import Starter, start_sample
from predictor.training.trainer import layer_trainer

MEMORY = Path("/dev/shm")
_SHARD_ROWS, _AT_ONCE = 16384, 4096
_PROFILED_ROWS = 51200
Value = TypeVar("Value")


@dataclass(frozen=True)
class _Sizes:
    tokens: int
    d_model: int
    d_ff: int
    rank: int

    @classmethod
    def of(cls, kit: Kit) -> _Sizes:
        return cls(3000, 128, 512, 32) if kit.dry else cls(400_000, 4096, 11008, 256)

    @property
    def bytes(self) -> int:
        """More than the store takes."""
        return self.tokens * (2 * self.d_model + self.d_ff // 4)


@contextmanager
def place(kit: Kit, name: str, size: int) -> Iterator[Path]:
    """Yield a place for large files, which goes at the end: in memory if it has twice the room."""
    memory = not kit.dry and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 2 * size
    path = (MEMORY if memory else kit.work) / f"psp-{name}"
    shutil.rmtree(path, ignore_errors=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def wait(kit: Kit) -> None:
    """Wait until the device has done everything."""
    if kit.device == "cuda":
        torch.cuda.synchronize()


def timed(kit: Kit, work: Callable[[], Value]) -> tuple[Value, float]:
    """Return what work makes, and the seconds until the device is done with it."""
    wait(kit)
    start = time.perf_counter()
    made = work()
    wait(kit)
    return made, time.perf_counter() - start


def write_traces(kit: Kit, path: Path, sizes: _Sizes) -> TraceStore:
    """Write the traces of one layer, made on the device."""
    device, generator = torch.device(kit.device), torch.Generator().manual_seed(0)
    layer = planted_layer(generator, sizes.d_model, sizes.d_ff)
    weights = LayerWeights(layer["up"] @ layer["down"], torch.ones(sizes.d_ff))
    told = replace(
        header(sizes.tokens), d_model=sizes.d_model, d_ff=sizes.d_ff, shard_rows=_SHARD_ROWS
    )
    store = TraceStore.create(path, told)
    store.save_weights([(0, weights)])
    placed = {name: matrix.to(device) for name, matrix in layer.items()}
    maker = RowMaker(device, lambda values: values > 0, dtype=torch.float16, bits=2)
    torch.manual_seed(0)
    with Meanwhile(store) as writing:
        for first in range(0, sizes.tokens, _SHARD_ROWS):
            rows = min(_SHARD_ROWS, sizes.tokens - first)
            segments = [(document, count) for document, count in documents(first, rows)]
            with writing.shard(segments, str(first)) as sink:
                for start in range(0, rows, _AT_ONCE):
                    begun = maker.begin(drawn(placed, min(_AT_ONCE, rows - start)))
                    begun.ready.wait()
                    sink(0, maker.finish(begun))
    store.finish()
    return store


def drawn(layer: Mapping[str, torch.Tensor], rows: int) -> Layer:
    """Draw what a model would do on some rows."""
    up, down, mean = layer["up"], layer["down"], layer["mean"]
    inputs = (torch.randn(rows, len(mean), device=mean.device) + mean).half()
    gate = inputs.float() @ down.T @ up.T
    opened = gate.add_(NOISE * torch.randn_like(gate)).relu_()
    norms = torch.ones(len(up), device=up.device)
    return Layer(residual=inputs, taps=[opened], product=opened, norms=norms, chosen=None)


def layer(kit: Kit) -> Iterator[Figure]:
    """All of a layer, twice, and then each of its parts."""
    sizes = _Sizes.of(kit)
    with place(kit, "train", sizes.bytes) as path:
        store, writing = timed(kit, lambda: write_traces(kit, path, sizes))
        trainer = _trainer(kit, store, sizes)
        trace_bytes = sum(file.stat().st_size for file in path.rglob("shard-*"))
        yield Figure(
            name="made traces written",
            value=trace_bytes / writing / 1e9,
            unit="GB/s",
            details={"seconds": writing, "bytes": trace_bytes, "where": str(path.parent)},
        )
        seconds = []
        for _ in range(2):
            result, took = timed(kit, lambda: _run(trainer, sizes))
            seconds.append(took)
        yield Figure(
            name=f"a layer of {sizes.d_model}×{sizes.d_ff}, rank {sizes.rank}, all of it",
            value=seconds[-1],
            unit="s",
            most=10,
            details={
                "first_seconds": seconds[0],
                "tokens": sizes.tokens,
                "epochs": [vars(epoch) for epoch in result.epochs],
                "metrics": result.metrics,
                "activation_sparsity": store.activation_sparsity()[0],
                **_peak(kit),
            },
        )
        yield from _parts(kit, trainer, sizes)
        yield from _streamed(kit, trainer, sizes)
        yield from _busy(kit, trainer, sizes)


def _trainer(kit: Kit, store: TraceStore, sizes: _Sizes) -> LayerTrainer:
    config = TrainConfig(
        traces=store.path,
        out=kit.work / "unused",
        rank=sizes.rank,
        predictor_type=F16,
        max_ppl_gap=0.001,
        device=kit.device,
    )
    return layer_trainer(config, store)


def _run(trainer: LayerTrainer, sizes: _Sizes) -> LayerResult:
    return trainer.run(0, Size(F16, sizes.rank), lambda steps: None, lambda epochs: None)


def _parts(kit: Kit, trainer: LayerTrainer, sizes: _Sizes) -> Iterator[Figure]:
    """The same calls as `LayerTrainer.run`'s, each by itself."""
    recipe, generator = trainer.recipe, trainer.generator(0)
    size = Size(F16, sizes.rank)
    rows, opening = timed(kit, lambda: trainer.rows(0))
    sample = start_sample(recipe, trainer.train, generator)
    start, starting = timed(kit, lambda: Starter(recipe, rows, sample).at(size, generator))
    steps: list[int] = []
    trained, training = timed(
        kit,
        lambda: train_layer(
            start,
            rows,
            train=trainer.train,
            holdout=trainer.holdout,
            generator=generator,
            dtype=trainer.dtype,
            on_step=steps.append,
            on_epoch=lambda epoch: None,
        ),
    )
    predictor = to_half(trained)
    _, measuring = timed(kit, lambda: evaluate(predictor, rows, trainer.holdout))
    _, curves = timed(
        kit,
        lambda: measure_layer(
            predictor, rows, trainer.train, trainer.holdout, trainer.generator(0)
        ),
    )
    kind = type(rows.rows).__name__
    for name, value in (
        ("rows read", opening),
        ("start", starting),
        ("epochs", training),
        ("metrics", measuring),
        ("curves", curves),
    ):
        details: dict[str, object] = {"rows": kind}
        if name == "epochs":
            details |= {"steps": len(steps), "microseconds_a_step": 1e6 * value / len(steps)}
        yield Figure(name=f"of that: {name}", value=value, unit="s", details=details)


def _some_steps(trainer: LayerTrainer, rows: LabelledRows, sizes: _Sizes) -> Callable[[], object]:
    """Return training on a part of the rows, from a start that is made here."""
    generator, train = trainer.generator(0), trainer.train[:_PROFILED_ROWS]
    sample = start_sample(trainer.recipe, train, generator)
    start = Starter(trainer.recipe, rows, sample).at(Size(F16, sizes.rank), generator)
    return lambda: train_layer(
        start,
        rows,
        train=train,
        holdout=trainer.holdout,
        generator=generator,
        dtype=trainer.dtype,
    )


def _busy(kit: Kit, trainer: LayerTrainer, sizes: _Sizes) -> Iterator[Figure]:
    """The share of training's time in which the card computes, and what it computes."""
    if kit.device != "cuda":
        return
    rows = trainer.rows(0)
    _, plain = timed(kit, _some_steps(trainer, rows, sizes))
    work = _some_steps(trainer, rows, sizes)
    kernels = watch(lambda: timed(kit, work))
    yield Figure(
        name="of the epochs' time, kernels run",
        value=100 * kernels.total / plain,
        unit="%",
        details={"seconds": plain, "kernel_seconds": kernels.total, "most": kernels.most},
    )


def _streamed(kit: Kit, trainer: LayerTrainer, sizes: _Sizes) -> Iterator[Figure]:
    """Rows that stay in files, as if they did not fit, against those in the card's memory."""
    device = torch.device(kit.device)
    held = trainer.rows(0)
    pieces = trainer.store.layer(0).pieces
    streamed = replace(held, rows=StreamedRows(device, *pieces))
    _, resident = timed(kit, _some_steps(trainer, held, sizes))
    _, taken = timed(kit, _some_steps(trainer, streamed, sizes))
    yield Figure(
        name="epochs with rows streamed, against rows in memory",
        value=taken / resident,
        unit="×",
        details={"seconds": taken, "seconds_resident": resident},
    )


def _peak(kit: Kit) -> dict[str, object]:
    if kit.device != "cuda":
        return {}
    return {"peak_device_bytes": torch.cuda.max_memory_allocated()}


STEPS = (Step(name="layer", seconds=50, run=layer),)
"""Of this stage."""
