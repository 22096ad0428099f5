"""What writing an exported file costs: memory and time, against copying the same bytes.

Makes a random checkpoint of LLaMA-7B's sizes with few layers and random predictors, exports it in a
process of its own and prints one JSON line: `peak_rss_bytes` and its bound (three times the largest
tensor and 500 MB), seconds of the export and of a copy of the written file, each synced to disk.

    python benchmarks/exporting.py --tokenizer tokenizer.model --layers 6
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import click
import torch

from benchmarks.shared import (
    in_process,
    made_header,
    peak_rss_bytes,
    print_line,
    random_llama_7b,
)
from gguf_export.bundle import export
from gguf_export.settings import ExportConfig
from gguf_files.reader import GGUFFile
from predictor.artifact import PredictorArtifact
from predictor.stored import LayerPredictor

RANK = 1024


@click.command()
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--layers", default=6, show_default=True)
@click.option("--dtype", type=click.Choice(["float16", "bfloat16"]), default="float16")
@click.option("--rounds", default=3, show_default=True)
def main(tokenizer: Path, layers: int, dtype: str, rounds: int) -> None:
    """Run the comparison."""
    with tempfile.TemporaryDirectory() as work:
        model = random_llama_7b(Path(work) / "model", layers, tokenizer, getattr(torch, dtype))
        predictors = random_predictors(Path(work) / "predictors", model)
        out = Path(work) / "out" / "m.powerinfer.gguf"
        runs, copies = [], []
        for _ in range(rounds):
            shutil.rmtree(out.parent, ignore_errors=True)  # a copy goes to a new file too
            runs.append(in_process(export_once, model, predictors, out))
            copies.append(copy_once(out, Path(work) / "copy"))
        print_line({"dtype": dtype, **summary(out, runs, copies)})


def random_predictors(path: Path, model: Path) -> Path:
    """Write random predictors for a model."""
    header = made_header(model, RANK, "random")
    artifact = PredictorArtifact(path, header)
    for layer in range(header.n_layers):
        fc1, fc2 = torch.randn(RANK, header.d_model), torch.randn(header.d_ff, RANK)
        counts = torch.arange(header.d_ff)
        artifact.add(layer, LayerPredictor(fc1.half(), fc2.half(), counts), {"recall": 0.0})
    return path


def export_once(model: Path, predictors: Path, out: Path) -> tuple[float, int]:
    """Export in this process; return seconds and peak resident memory in bytes."""
    start = time.perf_counter()
    export(ExportConfig(model=str(model), predictors=predictors, out=out, force=True))
    return time.perf_counter() - start, peak_rss_bytes()


def copy_once(source: Path, target: Path) -> float:
    """Return the seconds of a copy that has reached the disk."""
    target.unlink(missing_ok=True)
    start = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start


def summary(out: Path, runs: list[tuple[float, int]], copies: list[float]) -> dict[str, object]:
    """Return medians and the bound."""
    largest = max(info.size for info in GGUFFile(out).tensors.values())
    seconds, peaks = zip(*runs, strict=True)
    return {
        "bytes": out.stat().st_size,
        "largest_tensor_bytes": largest,
        "peak_rss_bytes": max(peaks),
        "bound_rss_bytes": 3 * largest + 500_000_000,
        "seconds_export": seconds,
        "seconds_copy": copies,
        "throughput_ratio": statistics.median(copies) / statistics.median(seconds),
    }


if __name__ == "__main__":
    main()
