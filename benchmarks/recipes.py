"""Both recipes side by side on one model, the same traces and the same held-out text.

Prints one JSON line a recipe: metrics on held-out documents, perplexity gap of the exported file in
the embedded engine (PowerInfer's windows), seconds of training.

    python benchmarks/recipes.py --model DIR --train FILE.jsonl --valid FILE.txt --tokens 100000
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import click
import torch

from common.decisions import mean_metrics
from gguf_export.bundle import ExportConfig, export
from gguf_export.schema import DENSE_THRESHOLD
from powerinfer_bridge.engine import Engine
from powerinfer_bridge.perplexity import engine_perplexity
from predictor.collect import CollectConfig, collect
from predictor.recipes import RECIPES
from predictor.training import TrainConfig, train_predictors


@click.command()
@click.option("--model", required=True, help="Checkpoint directory.")
@click.option("--train", "data", required=True, help="Text for traces, several documents.")
@click.option("--valid", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default=100_000, show_default=True)
@click.option("--rank", default=32, show_default=True)
@click.option("--context", default=256, show_default=True)
@click.option("--chunks", default=256, show_default=True, help="Perplexity windows, at most.")
@click.option("--recipe", "recipes", multiple=True, type=click.Choice(list(RECIPES)))
@click.option("--seed", default=0, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Keep traces and files here.")
def main(
    model: str,
    data: str,
    valid: Path,
    tokens: int,
    rank: int,
    context: int,
    chunks: int,
    recipes: tuple[str, ...],
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
        for recipe in recipes or tuple(RECIPES):
            start = time.perf_counter()
            artifact = train_predictors(
                TrainConfig(
                    traces=store.path,
                    out=directory / f"predictors-{recipe}",
                    rank=rank,
                    recipe=recipe,
                    seed=seed,
                    force=True,
                )
            )
            seconds = time.perf_counter() - start
            out = directory / f"export-{recipe}" / "model.powerinfer.gguf"
            export(ExportConfig(model=model, predictors=artifact.path, out=out, force=True))
            engine = Engine(out)
            if dense is None:
                all_neurons = engine.with_threshold(DENSE_THRESHOLD)
                dense = engine_perplexity(all_neurons, text, context, chunks, "dense")
            sparse = engine_perplexity(engine, text, context, chunks, recipe)
            row = {
                "recipe": recipe,
                "rank": rank,
                "tokens": store.rows,
                **mean_metrics(list(artifact.layers.values())),
                "ppl_dense": dense,
                "ppl_sparse": sparse,
                "ppl_gap": sparse / dense - 1,
                "seconds": seconds,
                "threads": torch.get_num_threads(),
            }
            click.echo(json.dumps(row))


if __name__ == "__main__":
    main()
