"""ProSparse on a small SiLU LLaMA: progressive L1 against a fixed λ and substitution alone.

With every seed a dense model is trained on the standard library's source. All arms start from it
and take the same number of further steps on the same windows in the same order:

- `silu`: no change, what perplexities are relative to;
- `relu`: ReLU, no L1;
- `fixed`: ReLU, then the last λ at once;
- `progressive`: ReLU, then λ in the card's stages.

Prints one JSON line an arm, and a last one with means over seeds and with what progressive λ gives
at equal sparsity. `arms.png` shows the same. `psp collect`, `train-predictor`, `export-gguf` and
`bench-powerinfer` take the directories from there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.sparsify_arms import draw_arms, summary
from prosparse.schedule import Schedule
from prosparse.settings import SparsifyConfig
from prosparse.training import sparsify
from quickstart.corpus import Corpus, write_corpus
from quickstart.model import build_model, train_tokenizer
from quickstart.settings import SIZES

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
WITHOUT_L1 = ("silu", "relu")


def schedule_of(arm: str, steps: int, factor: float) -> Schedule:
    """Return an arm's schedule, `factor` its last λ."""
    if arm in WITHOUT_L1:
        return Schedule.of(("substitution", 0, steps))
    kinds = [(kind, factor * share, round(steps * end)) for kind, share, end in SHAPE]
    if arm == "fixed":
        kinds = [kinds[0], ("warmup", factor, steps)]
    return Schedule.of(*kinds)


def run_seed(settings: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Train the dense model of a seed and its arms; what is finished is not trained again."""
    out, size = settings.out / f"seed-{seed}", SIZES[settings.size]
    corpus = Corpus(out / "corpus")
    if not corpus.valid.exists():
        characters = settings.characters or size.characters
        write_corpus(corpus.directory, characters=characters, seed=seed)
    dense = write_dense(settings, seed, corpus, out)
    rows = []
    for arm in settings.arms:
        for factor in [0.0] if arm in WITHOUT_L1 else settings.factors:
            config = SparsifyConfig(
                model=str(dense),
                out=out / f"{arm}-{settings.norm}-{factor:g}-{settings.steps}",
                schedule=schedule_of(arm, settings.steps, factor),
                activation="keep" if arm == "silu" else "relu",
                **shared(settings, seed, corpus, settings.learning_rate, settings.norm),
            )
            rows.append(train(arm, config))
    return rows


def write_dense(settings: argparse.Namespace, seed: int, corpus: Corpus, out: Path) -> Path:
    """Train the SiLU model that every arm of a seed starts from."""
    import torch

    size = SIZES[settings.size]
    start, dense = out / "random", out / "dense"
    if not (start / "tokenizer.model").exists():
        torch.manual_seed(seed)
        build_model(size, "silu").save_pretrained(start)
        train_tokenizer(corpus, start / "tokenizer.model", size.vocab_size)
    config = SparsifyConfig(
        model=str(start),
        out=dense,
        schedule=schedule_of("silu", settings.dense_steps, 0),
        activation="keep",
        **shared(settings, seed, corpus, size.learning_rate, "mean"),
    )
    train("dense", config)
    return dense


def shared(
    settings: argparse.Namespace, seed: int, corpus: Corpus, rate: float, norm: str
) -> dict[str, Any]:
    """Return what all runs have in common."""
    size = SIZES[settings.size]
    return {
        "data": str(corpus.train),
        "eval_data": str(corpus.valid),
        "eval_windows": settings.eval_windows,
        "context": size.context,
        "batch": size.batch,
        "learning_rate": rate,
        "warmup": 0.05,
        "norm": norm,
        "save_every": 10**9,
        "eval_every": settings.eval_every,
        "seed": seed,
        "device": "cpu",
        "resume": True,
    }


def train(arm: str, config: SparsifyConfig) -> dict[str, Any]:
    """Train an arm, print its line and return it."""
    began = time.perf_counter()
    result = sparsify(config)
    row = {"arm": arm, "seed": config.seed, "norm": config.norm}
    row["lambda"] = config.schedule.stages[-1].factor
    row |= {"learning_rate": config.learning_rate, **result}
    print(json.dumps(row | {"seconds": time.perf_counter() - began}), flush=True)
    return row


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", default="small", choices=tuple(SIZES))
    parser.add_argument("--characters", type=int, help="of the corpus, instead of the size's")
    parser.add_argument("--dense-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--lambdas", dest="factors", type=float, nargs="+", default=[0.05])
    parser.add_argument("--norm", choices=("mean", "sum"), default="mean")
    parser.add_argument("--arms", nargs="+", default=[*WITHOUT_L1, "fixed", "progressive"])
    parser.add_argument("--eval-windows", type=int, default=64)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Run the arms asked for, compare and draw them."""
    settings = arguments(given)

    import torch

    torch.set_num_threads(settings.threads)
    rows = [row for seed in settings.seeds for row in run_seed(settings, seed)]
    print(json.dumps(summary(rows)), flush=True)
    draw_arms(settings.out, rows)


if __name__ == "__main__":
    main()
