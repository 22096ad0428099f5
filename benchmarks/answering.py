"""Time of an evaluation: lm-eval's own model, psp's dense arm and its predictors, in turn.

    python benchmarks/answering.py --model DIR --predictors DIR --text FILE.txt

Prints one JSON document. All answer the same questions of the suite `tiny` in batches of the same
size; lm-eval's `hf` gets a tokenizer that gives psp's ids. Ratios are medians over rounds, in which
all run once in turn. The aims: dense / hf at most 1.05, predictors / dense at most 1.3.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.shared import print_line
from evaluation.answers import Answers
from evaluation.arms import Arm, Arms
from evaluation.asking import Asker
from evaluation.backends.backend import RequestKind
from evaluation.scoring import Questions, questions_of
from evaluation.settings import EvaluateConfig
from evaluation.suites.suite import open_suite
from evaluation.tasks.loading import load_tasks
from evaluation.tasks.quiet import quiet

Round = Callable[[Questions], Any]


@click.command()
@click.option("--model", required=True)
@click.option("--predictors", type=click.Path(path_type=Path), required=True)
@click.option("--text", type=click.Path(path_type=Path), required=True, help="Held-out text.")
@click.option("--batch-size", default=8)
@click.option("--limit", default=60.0, help="Questions a task.")
@click.option("--rounds", default=5)
@click.option("--device", default="cpu")
@click.option("--threads", default=2)
def main(
    model: str,
    predictors: Path,
    text: Path,
    batch_size: int,
    limit: float,
    rounds: int,
    device: str,
    threads: int,
) -> None:
    """Measure and print."""
    torch.set_num_threads(threads)
    config = EvaluateConfig(model=(model,), suite="tiny", data=text, limit=limit, device=device)
    suite = open_suite(config)
    arms = Arms(
        [
            Arm(name="dense", kind="dense", model=model),
            Arm(name="predictors", kind="predictors", model=model, predictors=predictors),
        ],
        device=device,
        dtype="auto",
    )
    questions = questions_of(load_tasks(suite.names, seed=0), arms.first, config)
    answer: dict[str, Round] = {"hf": theirs(model, arms, batch_size, device)}
    for arm in arms.arms:
        answer[arm.name] = ours(arms, arm, batch_size)
    by_kind: dict[RequestKind, list[Questions]] = {}
    for each in questions:
        by_kind.setdefault(each.kind, []).append(each)
    print_line(
        {
            "model": model,
            "batch_size": batch_size,
            "threads": threads,
            "device": device,
            "kinds": {kind: measured(answer, each, rounds) for kind, each in by_kind.items()},
        }
    )


def ours(arms: Arms, arm: Arm, size: int) -> Round:
    """Return what asks an arm."""
    backend, _ = arms.open(arm)
    tokenizer = arms.first.tokenizer
    return lambda each: Asker(backend, tokenizer, Answers(), size).ask(
        each.kind, each.arguments, arm.name
    )


def theirs(model: str, arms: Arms, size: int, device: str) -> Round:
    """Return what asks lm-eval's own model."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prosparse.tokenizer_output import write_tokenizer

    checkpoint = arms.first.checkpoint
    with tempfile.TemporaryDirectory() as name:
        source = checkpoint.directory
        write_tokenizer(source, arms.first.tokenizer, checkpoint.config, Path(name), lambda s: None)
        tokenizer = AutoTokenizer.from_pretrained(name)
    dtype = torch.float32 if device == "cpu" else checkpoint.dtype
    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
    with quiet():
        found: Any = HFLM(
            pretrained=causal_lm,
            tokenizer=tokenizer,
            batch_size=size,
            max_length=checkpoint.shape.context_length,
            device=device,
        )

    def ask(each: Questions) -> Any:
        requests = [Instance(each.kind, {}, args, 0) for args in each.arguments]
        return getattr(found, each.kind)(requests, disable_tqdm=True)

    return ask


def measured(
    answer: Mapping[str, Round], questions: list[Questions], rounds: int
) -> dict[str, Any]:
    """Return seconds of each and ratios, medians over rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in answer}
    for turn in range(rounds + 1):  # the first warms up
        for name, ask in answer.items():
            start = time.perf_counter()
            for each in questions:
                ask(each)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {
        "requests": sum(len(each.arguments) for each in questions),
        "seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "dense / hf": _ratio(seconds["dense"], seconds["hf"]),
        "predictors / dense": _ratio(seconds["predictors"], seconds["dense"]),
    }


def _ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main()
