"""ProSparse on a small SiLU LLaMA: progressive L1 against a fixed λ and substitution alone.

Every arm starts from the same dense model, trained on the standard library's source, and takes the
same number of further steps on the same windows in the same order:

- `silu`: no change, the bound's reference;
- `relu`: ReLU, no L1;
- `fixed`: ReLU, then the last λ at once;
- `progressive`: ReLU, then λ in the card's stages.

Prints one JSON line an arm. `psp collect`, `train-predictor`, `export-gguf` and `bench-powerinfer`
take the directories from there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from prosparse.schedule import Schedule, Stage
from prosparse.settings import SparsifyConfig
from prosparse.training import sparsify
from quickstart.corpus import Corpus, write_corpus
from quickstart.model import build_model, train_tokenizer
from quickstart.sizes import size_named

SHAPE = (
    ("substitution", 0.0, 0.1),
    ("warmup", 0.02, 0.15),
    ("progressive", 0.1, 0.2),
    ("progressive", 0.1, 0.25),
    ("progressive", 1.0, 0.35),
    ("decay", 1.0, 1.0),
)
"""Kinds, λ as a share of the last one, and ends as a share of all steps: the card's 1B schedule
without SFT, whose steps end at 95 000; ends rounded."""


def schedule_of(arm: str, steps: int, factor: float) -> Schedule:
    """Return an arm's schedule, `factor` its last λ."""
    if arm in ("silu", "relu"):
        return Schedule((Stage(kind="substitution", factor=0, until_step=steps),))
    kinds = [(kind, factor * share, round(steps * end)) for kind, share, end in SHAPE]
    if arm == "fixed":
        kinds = [kinds[0], ("warmup", factor, steps)]
    return Schedule(tuple(Stage(kind=k, factor=f, until_step=end) for k, f, end in kinds))


def write_dense(corpus: Corpus, out: Path, settings: argparse.Namespace) -> Path:
    """Train the SiLU model that every arm starts from."""
    import torch

    size = size_named(settings.size)
    start, dense = out / "random", out / "dense"
    torch.manual_seed(settings.seed)
    build_model(size, "silu").save_pretrained(start)
    train_tokenizer(corpus, start / "tokenizer.model", size.vocab_size)
    report(
        "dense",
        settings,
        corpus,
        SparsifyConfig(
            model=str(start),
            out=dense,
            schedule=schedule_of("silu", settings.dense_steps, 0),
            activation="keep",
            **shared(settings, corpus, size.learning_rate) | {"norm": "mean"},
        ),
    )
    return dense


def shared(settings: argparse.Namespace, corpus: Corpus, rate: float) -> dict[str, Any]:
    """Return what all runs have in common."""
    size = size_named(settings.size)
    return {
        "data": str(corpus.train),
        "eval_data": str(corpus.valid),
        "eval_windows": settings.eval_windows,
        "context": size.context,
        "batch": size.batch,
        "learning_rate": rate,
        "warmup": 0.05,
        "norm": settings.norm,
        "save_every": 10**9,
        "eval_every": settings.eval_every,
        "seed": settings.seed,
        "device": "cpu",
        "resume": True,
    }


def report(arm: str, settings: argparse.Namespace, corpus: Corpus, config: SparsifyConfig) -> None:
    """Train an arm and print its line."""
    began = time.perf_counter()
    result = sparsify(config)
    facts = {"arm": arm, "norm": config.norm, "lambda": config.schedule.stages[-1].factor}
    facts["learning_rate"] = config.learning_rate
    print(json.dumps({**facts, **result, "seconds": time.perf_counter() - began}), flush=True)


def main() -> None:
    """Run the arms asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", default="small")
    parser.add_argument("--dense-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--lambda", dest="factor", type=float, default=0.05)
    parser.add_argument("--norm", choices=("mean", "sum"), default="mean")
    parser.add_argument("--arms", nargs="*", default=["silu", "relu", "fixed", "progressive"])
    parser.add_argument("--eval-windows", type=int, default=64)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    settings = parser.parse_args()

    import torch

    torch.set_num_threads(settings.threads)
    size = size_named(settings.size)
    corpus = Corpus(settings.out / "corpus" / "train.jsonl", settings.out / "corpus" / "valid.txt")
    if not corpus.valid.exists():
        characters = size.characters
        write_corpus(corpus.train.parent, characters=characters, seed=settings.seed)
    dense = write_dense(corpus, settings.out, settings)
    for arm in settings.arms:
        report(
            arm,
            settings,
            corpus,
            SparsifyConfig(
                model=str(dense),
                out=settings.out / f"{arm}-{settings.norm}-{settings.factor:g}-{settings.steps}",
                schedule=schedule_of(arm, settings.steps, settings.factor),
                activation="keep" if arm == "silu" else "relu",
                **shared(settings, corpus, settings.learning_rate),
            ),
        )


if __name__ == "__main__":
    main()
