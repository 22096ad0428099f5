"""Recipes side by side on one model, the same traces and the same held-out text.

Prints one JSON line a row of `ROWS`: metrics on held-out documents, perplexity gap of the exported
file in the embedded engine (PowerInfer's windows), FFN bytes on that text, seconds of training.

    python benchmarks/recipes.py --model DIR --train FILE.jsonl --valid FILE.txt --tokens 100000
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from common.decisions import DecisionCounts, mean_metrics
from gguf_export.bundle import ExportConfig, export
from gguf_export.schema import DENSE_THRESHOLD
from powerinfer_bridge.engine import Engine
from powerinfer_bridge.perplexity import engine_perplexity
from predictor.collection.collect import CollectConfig, collect
from predictor.training.config import TrainConfig
from predictor.training.run import train_predictors

ROWS: dict[str, dict[str, Any]] = {
    "dejavu": {"recipe": "dejavu", "rank": "auto"},
    "psp": {"recipe": "psp", "rank": "auto"},
    "psp-rank-32": {"recipe": "psp", "rank": 32},
    "psp-rank-32-gap": {"recipe": "psp", "rank": 32, "max_ppl_gap": 0.001},
    "dejavu-rank-32": {"recipe": "dejavu", "rank": 32},
    "dejavu-rank-32-bytes": {"recipe": "dejavu", "rank": 32, "ffn_bytes": 0.08},
    "psp-rank-32-bytes": {"recipe": "psp", "rank": 32, "ffn_bytes": 0.08},
    "svd-rank-64-bytes": {"recipe": "svd", "rank": 64, "ffn_bytes": 0.18},
    "svd": {"recipe": "svd", "rank": "auto"},
}
"""Name to settings: the published method as it is, ours as it is, and both at equal rank and equal
bytes, the thresholds of both chosen in the same way."""


@click.command()
@click.option("--model", required=True, help="Checkpoint directory.")
@click.option("--train", "data", required=True, help="Text for traces, several documents.")
@click.option("--valid", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default=100_000, show_default=True)
@click.option("--context", default=256, show_default=True)
@click.option("--chunks", default=256, show_default=True, help="Perplexity windows, at most.")
@click.option("--row", "rows", multiple=True, type=click.Choice(list(ROWS)), help="[default: all]")
@click.option("--seed", default=0, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Keep traces and files here.")
def main(
    model: str,
    data: str,
    valid: Path,
    tokens: int,
    context: int,
    chunks: int,
    rows: tuple[str, ...],
    seed: int,
    work: Path | None,
) -> None:
    """Run the comparison."""
    text = valid.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        directory = work or Path(temporary)
        store = collect(
            CollectConfig(
                model=model,
                data=data,
                out=directory / "traces",
                tokens=tokens,
                context=context,
                seed=seed,
                resume=True,
            )
        )
        dense = None
        for name in rows or tuple(ROWS):
            start = time.perf_counter()
            out = directory / f"predictors-{name}"
            artifact = train_predictors(
                TrainConfig(traces=store.path, out=out, seed=seed, force=True, **ROWS[name])
            )
            seconds = time.perf_counter() - start
            file = directory / f"export-{name}" / "model.powerinfer.gguf"
            export(ExportConfig(model=model, predictors=artifact.path, out=file, force=True))
            engine = Engine(file)
            if dense is None:
                all_neurons = engine.with_threshold(DENSE_THRESHOLD)
                dense = engine_perplexity(all_neurons, text, context, chunks, "dense")
            counts = engine.count()
            sparse = engine_perplexity(engine, text, context, chunks, name)
            row = {
                "row": name,
                **ROWS[name],
                "ranks": [artifact.rank(layer) for layer in range(len(counts))],
                "tokens": store.rows,
                "holdout": mean_metrics(list(artifact.layers.values())),
                **text_metrics(engine, counts),
                "ppl_dense": dense,
                "ppl_sparse": sparse,
                "ppl_gap": sparse / dense - 1,
                "search": artifact.search,
                "seconds": seconds,
                "threads": torch.get_num_threads(),
            }
            click.echo(json.dumps(row))


def text_metrics(engine: Engine, counts: list[DecisionCounts]) -> dict[str, float]:
    """Return the mean metrics of what the engine decided on the text."""
    hyper = engine.hyper
    return mean_metrics(
        [
            layer.metrics(rank=engine.rank(number), d_model=hyper.d_model, d_ff=hyper.d_ff)
            for number, layer in enumerate(counts)
        ]
    )


if __name__ == "__main__":
    main()
