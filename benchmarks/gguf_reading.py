"""What collecting traces from a GGUF file costs beside the same model's safetensors.

Prints one JSON line: of each kind the seconds (median, wall and CPU) and the peak memory of a whole
collection in a process of its own, taken in turn, and their ratios. `--quantised` holds a Q4_0 file
beside them, which has to be dequantised.

    python benchmarks/gguf_reading.py --tokenizer tokenizer.model --data FILE.jsonl --layers 1
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import click
import torch

from architectures.checkpoint import Checkpoint
from benchmarks.shared import in_process, peak_rss_bytes, print_line, random_llama_7b
from gguf_export.pwri.element_types import FileTypes
from gguf_export.tokens.model_vocabulary import read_vocabulary
from gguf_export.writer import ModelWriter
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig


@click.command()
@click.option("--tokenizer", required=True, type=click.Path(path_type=Path))
@click.option("--data", required=True, help="Text, several documents.")
@click.option("--layers", default=1, show_default=True, help="Layers of LLaMA-7B's sizes.")
@click.option("--tokens", default=256, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Runs of each kind, in turn.")
@click.option("--quantised", is_flag=True, help="A Q4_0 file too.")
def main(
    tokenizer: Path, data: str, layers: int, tokens: int, rounds: int, quantised: bool
) -> None:
    """Run the comparison."""
    with tempfile.TemporaryDirectory() as work:
        models = write_models(Path(work), layers, tokenizer, ["f16", *["q4_0"] * quantised])
        runs: dict[str, list[tuple[float, float, int]]] = {kind: [] for kind in models}
        for _ in range(rounds):
            for kind, model in models.items():
                config = CollectConfig(model=model, data=data, out=Path(work) / "t", tokens=tokens)
                runs[kind].append(in_process(measure, config))
        sizes = {kind: weights_bytes(Path(model)) for kind, model in models.items()}
        print_line(document(runs, sizes) | {"tokens": tokens, "layers": layers})


def write_models(work: Path, layers: int, tokenizer: Path, types: list[str]) -> dict[str, str]:
    """Write a random checkpoint in float16 and files of it; return their names by kind."""
    directory = random_llama_7b(work / "model", layers, tokenizer, torch.float16)
    checkpoint, models = Checkpoint.open(directory), {"safetensors": str(directory)}
    rows, config = checkpoint.shape.vocab_size, checkpoint.config
    vocabulary = read_vocabulary(checkpoint.directory, rows, config)
    for name in types:
        path = work / f"{name}.gguf"
        writer = ModelWriter(checkpoint, vocabulary, FileTypes(weights=name, predictors=name))
        writer.write(path, path, {}, sparse=True)
        models[name] = str(path)
    return models


def measure(config: CollectConfig) -> tuple[float, float, int]:
    """Collect; return wall and CPU seconds, and the peak of this process's memory, bytes."""
    with tempfile.TemporaryDirectory() as work:
        start, used = time.perf_counter(), time.process_time()
        collect(CollectConfig(**{**vars(config), "out": Path(work) / "traces"}))
        seconds = time.perf_counter() - start, time.process_time() - used
    return *seconds, peak_rss_bytes()


def weights_bytes(model: Path) -> int:
    """Return the bytes of a model's weights."""
    files = model.glob("*.safetensors") if model.is_dir() else [model]
    return sum(file.stat().st_size for file in files)


def document(
    runs: dict[str, list[tuple[float, float, int]]], sizes: dict[str, int]
) -> dict[str, object]:
    """Return medians of each kind, and their ratios to those of safetensors."""
    medians = {
        kind: [statistics.median(column) for column in zip(*found, strict=True)]
        for kind, found in runs.items()
    }
    base = medians["safetensors"]
    return {
        kind: {
            "weights_bytes": sizes[kind],
            "seconds": [wall for wall, _, _ in runs[kind]],
            "cpu_seconds": [cpu for _, cpu, _ in runs[kind]],
            "peak_rss_bytes": [peak for _, _, peak in runs[kind]],
            "ratio_seconds": found[0] / base[0],
            "ratio_cpu_seconds": found[1] / base[1],
            "ratio_peak_rss": found[2] / base[2],
        }
        for kind, found in medians.items()
    }


if __name__ == "__main__":
    main()
