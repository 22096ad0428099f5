"""What training one layer of LLaMA-7B's shape costs: memory, time.

Prints one JSON line. The layer is synthetic: neurons are active where a random map of low rank plus
noise exceeds what leaves the wanted share of them active. Writing the traces and training are
children, whose memory is sampled from outside: `peak_anonymous_bytes` is what they hold
themselves and must not depend on `--tokens`; `peak_file_bytes` are pages of mapped files, which
the system drops when somebody needs memory; `peak_rss_bytes` is the peak of both together.

    python benchmarks/training.py --tokens 100000 --work DIR
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import click
import torch

from benchmarks.shared import print_line
from predictor.collection.recorder import row_importance
from predictor.traces.manifest import TraceHeader
from predictor.traces.packing import active_places, pack_active, pack_codes
from predictor.traces.rows import LayerWeights
from predictor.traces.shard_file import BatchRows
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import RECIPES, TrainConfig

D_MODEL, D_FF, SPARSITY = 4096, 11008, 0.88
DOCUMENT, SHARD_ROWS, BATCH = 1000, 4096, 512
PLANTED_RANK, NOISE = 64, 0.3


@click.command()
@click.option("--tokens", default=100_000, show_default=True)
@click.option("--rank", default=128, show_default=True)
@click.option("--epochs", default=1, show_default=True)
@click.option("--recipe", default="psp", show_default=True, type=click.Choice(list(RECIPES)))
@click.option("--work", type=click.Path(path_type=Path), help="Make a temporary directory here.")
def main(tokens: int, rank: int, epochs: int, recipe: str, work: Path | None) -> None:
    """Write a synthetic layer's traces, train on them and print what it took."""
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        traces = Path(temporary, "traces")
        written = measured(write_traces, traces, tokens)
        trained = measured(train, traces, rank, epochs, recipe)
        files = [file for file in traces.rglob("shard-*") if file.is_file()]
        store = TraceStore.open(traces)
        row = {
            "tokens": tokens,
            "d_model": D_MODEL,
            "d_ff": D_FF,
            "activation_sparsity": store.activation_sparsity()[0],
            "recipe": recipe,
            "rank": rank,
            "epochs": epochs,
            "trace_bytes": sum(file.stat().st_size for file in files),
            "rows_per_second": tokens * epochs / trained["seconds"],
            **trained,
            "writing": written,
            "threads": torch.get_num_threads(),
        }
    print_line(row)


def measured(function: Callable[..., None], *arguments: object) -> dict[str, float]:
    """Run a function in a new process, sampling its memory; return bytes and seconds."""
    start, peaks = time.perf_counter(), dict.fromkeys(("VmHWM", "RssAnon", "RssFile"), 0)
    process = get_context("spawn").Process(target=function, args=arguments)
    process.start()
    while process.is_alive():
        # A process that has just ended has no such lines any more.
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], 1024 * int(value.split()[0]))
        time.sleep(0.01)
    if process.exitcode:
        raise click.ClickException(f"{function.__name__} failed")
    return {
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": peaks["VmHWM"],
        "peak_anonymous_bytes": peaks["RssAnon"],
        "peak_file_bytes": peaks["RssFile"],
    }


def train(traces: Path, rank: int, epochs: int, recipe: str) -> None:
    """Train as `psp train-predictor` does, for another number of epochs."""
    RECIPES[recipe] = replace(RECIPES[recipe], epochs=epochs)
    out = traces.with_name("predictors")
    train_predictors(TrainConfig(traces=traces, out=out, rank=rank, recipe=recipe))


def write_traces(path: Path, tokens: int) -> None:
    """Write a store of one layer, batch by batch."""
    generator = torch.Generator().manual_seed(0)
    layer = planted_layer(generator)
    store = TraceStore.create(path, header(tokens))
    store.save_weights([(0, LayerWeights(layer["up"] @ layer["down"], torch.ones(D_FF)))])
    for first in range(0, tokens, SHARD_ROWS):
        rows = min(SHARD_ROWS, tokens - first)
        with store.shard(list(documents(first, rows)), str(first)) as writers:
            for start in range(0, rows, BATCH):
                writers[0].append(batch(layer, min(BATCH, rows - start), generator))
    store.finish()


def planted_layer(
    generator: torch.Generator, d_model: int = D_MODEL, d_ff: int = D_FF
) -> dict[str, torch.Tensor]:
    """Draw a gate `up @ down`, which noise disturbs, closed for all but the wanted share.

    It has no bias, so the inputs have a mean, which only the last hidden unit sees.
    """
    down = torch.randn(PLANTED_RANK, d_model, generator=generator) / math.sqrt(d_model)
    mean = torch.randn(d_model, generator=generator)
    down -= torch.outer(down @ mean, mean) / mean.square().sum()
    down[-1] = mean / mean.square().sum()
    up = torch.randn(d_ff, PLANTED_RANK, generator=generator) / math.sqrt(PLANTED_RANK)
    spread = math.sqrt(1 + NOISE**2)
    up[:, -1] = -spread * torch.special.ndtri(torch.tensor(SPARSITY))
    return {"down": down, "up": up, "mean": mean}


def batch(layer: dict[str, torch.Tensor], rows: int, generator: torch.Generator) -> BatchRows:
    """Draw rows as the recorder hands them over."""
    up, down, mean = layer["up"], layer["down"], layer["mean"]
    inputs = (torch.randn(rows, len(mean), generator=generator) + mean).half()
    gate = inputs.float() @ down.T @ up.T
    gate += NOISE * torch.randn(gate.shape, generator=generator)
    packed = pack_active(gate > 0)
    row, _ = active_places(packed)
    scale, codes = row_importance(gate[gate > 0], row, rows, 2)
    stored = torch.from_numpy(pack_codes(codes.numpy(), 2))
    return BatchRows(inputs, packed, (gate > 0).sum(0), scale, stored)


def documents(first: int, rows: int) -> Iterator[list[int]]:
    """Yield document number and rows of each run of rows from `first` on."""
    while rows:
        part = min(rows, DOCUMENT - first % DOCUMENT)
        yield [first // DOCUMENT, part]
        first, rows = first + part, rows - part


def header(tokens: int) -> TraceHeader:
    """Return a header of no real model."""
    return TraceHeader(
        architecture="llama",
        activation="relu",
        ffn_matrices=3,
        model="synthetic",
        model_fingerprint="synthetic",
        activation_threshold=0.0,
        n_layers=1,
        layers=(0,),
        d_model=D_MODEL,
        d_ff=D_FF,
        input_dtype="float16",
        importance_bits=2,
        compute_dtype="float32",
        data="synthetic",
        field="text",
        chat_template="none",
        tokens=tokens,
        context=256,
        batch=4,
        shard_rows=SHARD_ROWS,
        seed=0,
    )


if __name__ == "__main__":
    main()
