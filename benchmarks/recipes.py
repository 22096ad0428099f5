"""Recipes side by side on one model, the same traces and the same held-out text.

Prints one JSON line a row of `ROWS`: metrics on held-out documents, perplexity gap of the exported
file in the embedded engine (PowerInfer's windows), FFN bytes on that text, mean divergence of the
next-token distributions on it (the expected gap, which scatters far less), seconds of training.

    python benchmarks/recipes.py --model DIR --train FILE.jsonl --valid FILE.txt --tokens 100000
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch

from architectures.checkpoint import Checkpoint
from architectures.rounded import rounded
from architectures.windows import document_windows
from benchmarks.shared import print_line
from common.decisions import mean_metrics
from common.element_types import ELEMENT_NAMES
from common.typed_json import plain as as_plain
from gguf_export.bundle import export
from gguf_export.pwri.schema import DENSE_THRESHOLD
from gguf_export.settings import ExportConfig
from powerinfer_bridge.benchmark.quality import count_layers, mean_layer
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.engine.perplexity import engine_perplexity
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.thresholds.predicted_model import PredictedModel
from predictor.training.run import train_predictors
from predictor.training.settings import RECIPES, TrainConfig, published_rank

CONTEXT = 256

QUARTER = "quarter"
"""A quarter of d_model, dejavu's rank."""

ROWS: dict[str, dict[str, Any]] = {
    "dejavu": {"recipe": "dejavu", "rank": "auto"},
    "dejavu-q4_0": {"recipe": "dejavu", "rank": "auto", "predictor_type": "q4_0"},
    "psp": {"recipe": "psp", "rank": "auto"},
    "psp-f16": {"recipe": "psp", "rank": "auto", "predictor_type": "f16"},
    "psp-rank-64-q4_0": {"recipe": "psp", "rank": 64, "predictor_type": "q4_0"},
    "psp-rank-64-q4_0-bytes": {
        "recipe": "psp",
        "rank": 64,
        "predictor_type": "q4_0",
        "ffn_bytes": 0.06,
    },
    "pairs-rank-64-q4_0-bytes": {
        "recipe": "psp",
        "pairs": True,
        "rank": 64,
        "predictor_type": "q4_0",
        "bytes_of": "psp-rank-64-q4_0-bytes",
    },
    "psp-as-dejavu": {"recipe": "psp", "rank": QUARTER, "bytes_of": "dejavu"},
    "psp-1-as-dejavu": {"recipe": "psp", "rank": QUARTER, "bytes_of": "dejavu", "epochs": 1},
    "svd-as-dejavu": {"recipe": "svd", "rank": QUARTER, "bytes_of": "dejavu"},
    "svd-auto-as-dejavu": {"recipe": "svd", "rank": "auto", "bytes_of": "dejavu"},
    "psp-1-quarter": {"recipe": "psp", "rank": QUARTER, "epochs": 1},
    "svd-quarter": {"recipe": "svd", "rank": QUARTER},
    "dejavu-rank-32": {"recipe": "dejavu", "rank": 32},
    "psp-rank-32": {"recipe": "psp", "rank": 32},
    "psp-rank-32-as-dejavu": {"recipe": "psp", "rank": 32, "bytes_of": "dejavu-rank-32"},
    "svd-rank-32-as-dejavu": {"recipe": "svd", "rank": 32, "bytes_of": "dejavu-rank-32"},
    "svd-auto-as-dejavu-rank-32": {"recipe": "svd", "rank": "auto", "bytes_of": "dejavu-rank-32"},
    "dejavu-rank-32-bytes": {"recipe": "dejavu", "rank": 32, "ffn_bytes": 0.09},
    "psp-rank-32-bytes": {"recipe": "psp", "rank": 32, "bytes_of": "dejavu-rank-32-bytes"},
}
"""Name to settings: the published method as it is, ours as it is, and others at equal rank and
equal bytes. `bytes_of` takes the bytes that another row read of the text; `epochs` replaces the
recipe's, `pairs` its start. Seconds are those of the first training, with thresholds where a row
has a bound."""

_RECIPES = dict(RECIPES)
"""As they are without a row's epochs."""

NEAR, TRIES = 0.01, 4
"""Bytes are bounded on training rows, and other text reads more or less: the bound is moved until
the text's bytes are another row's within this share, or so often."""


@click.command()
@click.option("--model", required=True, help="Checkpoint directory.")
@click.option("--train", "data", required=True, help="Text for traces, several documents.")
@click.option("--valid", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default=100_000, show_default=True)
@click.option("--chunks", default=256, show_default=True, help="Perplexity windows, at most.")
@click.option("--row", "rows", multiple=True, type=click.Choice(list(ROWS)), help="[default: all]")
@click.option("--outtype", type=click.Choice(ELEMENT_NAMES), default="f16", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Keep traces and files here.")
def main(
    model: str,
    data: str,
    valid: Path,
    tokens: int,
    chunks: int,
    rows: tuple[str, ...],
    outtype: str,
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
                context=CONTEXT,
                seed=seed,
                resume=True,
            )
        )
        dense, read = None, dict[str, float]()
        model_on_text = masked_model(model, outtype, text, chunks)
        for name in rows or tuple(ROWS):
            out = directory / f"predictors-{name}"
            file = directory / f"export-{name}" / "model.powerinfer.gguf"
            values, wanted = settings(name, read, store.header.d_model)
            values["outtype"] = outtype
            start = time.perf_counter()
            artifact = train_predictors(
                TrainConfig(traces=store.path, out=out, seed=seed, force=True, **values)
            )
            seconds = time.perf_counter() - start
            for tries in range(1, TRIES + 1):
                plain = ExportConfig(model=model, predictors=out, out=file, force=True)
                export(replace(plain, outtype=outtype))
                engine = Engine(file)
                counts = engine.count()
                sparse = engine_perplexity(engine, text, CONTEXT, chunks, name)
                metrics = mean_layer(count_layers(engine, counts))
                read[name] = metrics.ffn_bytes_ratio
                if not wanted or abs(read[name] / wanted - 1) <= NEAR or tries == TRIES:
                    break
                values["ffn_bytes"] *= wanted / read[name]
                artifact = train_predictors(
                    TrainConfig(traces=store.path, out=out, seed=seed, resume=True, **values)
                )
            if dense is None:
                all_neurons = engine.with_threshold(DENSE_THRESHOLD)
                dense = engine_perplexity(all_neurons, text, CONTEXT, chunks, "dense")
            layers = {n: artifact.layer(n) for n in range(len(counts))}
            predictors = {n: each.predictor() for n, each in layers.items()}
            quality = model_on_text.quality(predictors, artifact.header.threshold)
            row = {
                "row": name,
                **ROWS[name],
                "outtype": outtype,
                "ranks": [artifact.exported_size(layer).rank for layer in layers],
                "types": [artifact.exported_size(layer).kind for layer in layers],
                "dense": sorted(artifact.dense),
                "tokens": store.rows,
                "holdout": mean_metrics(list(artifact.layers.values())),
                **vars(metrics),
                "kl_divergence": quality.kl_divergence,
                "ppl_dense": dense,
                "ppl_sparse": sparse,
                "ppl_gap": sparse / dense - 1,
                "search": as_plain(artifact.search),
                "seconds": seconds,
                "threads": torch.get_num_threads(),
            }
            print_line(row)


def settings(
    name: str, read: Mapping[str, float], d_model: int
) -> tuple[dict[str, Any], float | None]:
    """Return the settings of a row as `TrainConfig` takes them, and the bytes it is to read.

    Args:
        name: of the row.
        read: FFN bytes ratio of earlier rows by name.
        d_model: of the model.
    """
    values, wanted = dict(ROWS[name]), None
    if values["rank"] == QUARTER:
        values["rank"] = published_rank(d_model)
    if other := values.pop("bytes_of", None):
        if other not in read:
            raise click.UsageError(f"--row {name} needs --row {other} before it")
        values["ffn_bytes"] = wanted = read[other]
    recipe = _RECIPES[values["recipe"]]
    recipe = recipe.with_pairs() if values.pop("pairs", False) else recipe
    RECIPES[recipe.name] = replace(recipe, epochs=values.pop("epochs", recipe.epochs))
    return values, wanted


def masked_model(model: str, outtype: str, text: str, chunks: int) -> PredictedModel:
    """Return the model with windows of the text, begun as PowerInfer begins them."""
    checkpoint = rounded(Checkpoint.open(model), outtype)
    tokenizer = checkpoint.tokenizer()
    windows = islice(document_windows([text], tokenizer, CONTEXT, as_powerinfer=True), chunks)
    return PredictedModel(checkpoint, [window for _, window in windows], "cpu")


if __name__ == "__main__":
    main()
