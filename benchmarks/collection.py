"""What collecting traces costs beyond running the model: time, disk and memory.

Prints one JSON line. `ratio_time` compares recording (tokenising, running, writing, checksums,
sync) with the bare forward pass of the same model on the same batches, taken in turn; `ratio_disk`
compares with a recorder that stores inputs and labels as float16; `extra_rss_bytes` is the peak of
a whole collection beyond that of a process that loads the model and runs one batch.

    python benchmarks/collection.py --model DIR --data FILE.jsonl --tokens 50000
    python benchmarks/collection.py --llama-7b-layers 2 --data FILE.jsonl --tokens 8192
    python benchmarks/collection.py --model DIR --data FILE.jsonl --memory 50000 --memory 500000
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from architectures.checkpoint import Checkpoint
from architectures.model import LoadedModel, load_model
from benchmarks.shared import in_process, peak_rss_bytes, print_line, random_llama_7b
from common.documents import read_documents
from predictor.collection.collect import collect, record, trace_header
from predictor.collection.settings import CollectConfig
from predictor.collection.windows import cut_batches, cut_shards, cut_windows, order_windows
from predictor.traces.manifest import TraceHeader
from predictor.traces.store import TraceStore

CONTEXT = 256


@click.command()
@click.option("--model", help="Checkpoint directory.")
@click.option("--llama-7b-layers", type=int, help="Use a random model of LLaMA-7B's sizes instead.")
@click.option("--data", required=True, help="Text, several documents.")
@click.option("--tokens", default=50_000, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Runs of each kind, in turn.")
@click.option("--memory", multiple=True, type=int, help="Measure memory at this many tokens.")
@click.option("--tokenizer", help="tokenizer.model for the random model.  [default: of --model]")
def main(
    model: str | None,
    llama_7b_layers: int | None,
    data: str,
    tokens: int,
    rounds: int,
    memory: tuple[int, ...],
    tokenizer: str | None,
) -> None:
    """Run the comparison."""
    with tempfile.TemporaryDirectory() as work:
        directory = Path(work)
        if llama_7b_layers:
            source = Path(tokenizer or f"{model}/tokenizer.model")
            path = random_llama_7b(directory / "random", llama_7b_layers, source, torch.float16)
            model = str(path)
        assert model is not None
        config = CollectConfig(
            model=model,
            data=data,
            out=directory / "traces",
            tokens=tokens,
            context=CONTEXT,
        )
        print_line(
            measure_memory(config, memory) if memory else measure_time_and_disk(config, rounds)
        )


def batches(config: CollectConfig, header: TraceHeader, checkpoint: Checkpoint) -> Iterator[Any]:
    """Yield the batches that a collection runs."""
    tokenizer = checkpoint.tokenizer()
    windows = cut_windows(read_documents(config.data), tokenizer, header.context)
    for shard in cut_shards(windows, header.shard_rows, header.tokens):
        yield from cut_batches(order_windows(shard), header.batch * header.context)


def padded(batch: Any) -> torch.Tensor:
    """Return a batch's (windows, length) int64 token ids."""
    rows = [torch.tensor(window.tokens) for window in batch]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def loaded(config: CollectConfig, checkpoint: Checkpoint) -> LoadedModel:
    """Load the model as a collection does."""
    return load_model(checkpoint, dtype=torch.float32, device="cpu", head=False)


def measure_time_and_disk(config: CollectConfig, rounds: int) -> dict[str, object]:
    """Time both in turn on one machine and weigh the store."""
    checkpoint = Checkpoint.open(config.model)
    header = trace_header(config, checkpoint, "none")
    inputs = [padded(batch) for batch in batches(config, header, checkpoint)]
    bare, hooked = loaded(config, checkpoint), loaded(config, checkpoint)
    tokenizer = checkpoint.tokenizer()
    seconds: dict[str, list[float]] = {"forward": [], "collect": []}
    for _ in range(rounds):
        start = time.perf_counter()
        for tokens in inputs:
            bare.through(tokens)
        seconds["forward"].append(time.perf_counter() - start)
        shutil.rmtree(config.out, ignore_errors=True)
        start = time.perf_counter()
        store = TraceStore.create(config.out, header)
        record(hooked, checkpoint, tokenizer, store)
        seconds["collect"].append(time.perf_counter() - start)
        hooked = loaded(config, checkpoint)
    rows, shape = store.rows, checkpoint.shape
    size = sum(file.stat().st_size for file in config.directory.rglob("*") if file.is_file())
    weights = sum(file.stat().st_size for file in config.directory.rglob("weights.safetensors"))
    reference = 2 * (shape.d_model + shape.d_ff) * shape.n_layers * rows
    return {
        "model": config.model,
        "tokens": rows,
        "activation_sparsity": sum(store.activation_sparsity().values()) / shape.n_layers,
        "seconds_forward": seconds["forward"],
        "seconds_collect": seconds["collect"],
        "ratio_time": statistics.median(seconds["collect"]) / statistics.median(seconds["forward"]),
        "bytes_per_token_and_layer": (size - weights) / rows / shape.n_layers,
        "ratio_disk": (size - weights) / reference,
        "ratio_disk_with_weights": size / reference,
        "importance_bits": config.importance_bits,
        "threads": torch.get_num_threads(),
    }


def measure_memory(config: CollectConfig, counts: tuple[int, ...]) -> dict[str, object]:
    """Compare peaks of processes of their own."""
    base = in_process(peak_of_one_batch, replace(config, tokens=counts[0]))
    peaks = [in_process(peak_of_collection, replace(config, tokens=count)) for count in counts]
    return {
        "model": config.model,
        "base_rss_bytes": base,
        "tokens": list(counts),
        "extra_rss_bytes": [peak - base for peak in peaks],
    }


def peak_of_one_batch(config: CollectConfig) -> int:
    """Load the model and run one batch; return the peak of this process's memory, bytes."""
    checkpoint = Checkpoint.open(config.model)
    header = trace_header(config, checkpoint, "none")
    loaded(config, checkpoint).through(padded(next(batches(config, header, checkpoint))))
    return peak_rss_bytes()


def peak_of_collection(config: CollectConfig) -> int:
    """Collect, and return the peak of this process's memory, bytes."""
    with tempfile.TemporaryDirectory() as work:
        collect(replace(config, out=Path(work) / "traces"))
    return peak_rss_bytes()


if __name__ == "__main__":
    main()
