"""Small tasks on this disk, one of each kind of request, as users write them for lm-eval."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from evaluation.settings import EvaluateConfig

WORDS = ("fox", "dog", "token", "class", "range", "import")


def write_task(directory: Path, name: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    """Write a task file and its questions beside it."""
    directory.mkdir(exist_ok=True)
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    whole = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 1.0},
        **settings,
    }
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")


def write_tasks(directory: Path, *, count: int = 12) -> Path:
    """Write a multiple choice, a cloze, a continuation and a perplexity."""
    rows = [
        {
            "text": f"The quick brown {WORDS[n % 6]} number {n} jumps over",
            "choices": [f"the {word}" for word in WORDS[: 2 + n % 3]],
            "answer": n % 2,
            "target": WORDS[(n + 1) % 6],
            "page": f"Number {n}. In the beginning there was a {WORDS[n % 6]}. " * 4,
        }
        for n in range(count)
    ]
    write_task(
        directory,
        "choose",
        rows,
        output_type="multiple_choice",
        doc_to_text="{{text}}",
        doc_to_choice="choices",
        doc_to_target="answer",
        num_fewshot=1,
        fewshot_config={"sampler": "first_n", "split": "test"},
        metric_list=[
            {"metric": m, "aggregation": "mean", "higher_is_better": True}
            for m in ("acc", "acc_norm")
        ],
    )
    write_task(
        directory,
        "cloze",
        rows,
        output_type="loglikelihood",
        doc_to_text="{{text}}",
        doc_to_target=" {{target}}",
        target_delimiter="",
        metric_list=[
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    )
    write_task(
        directory,
        "continue",
        rows,
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{target}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    write_task(
        directory,
        "pages",
        rows,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{page}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    return directory


def own_task(directory: Path, name: str, *metrics: str, **changes: Any) -> str:
    """Write a task of choices, texts or pages with metrics of lm-eval's."""
    rows = [
        {
            "text": f"The quick brown fox number {n} jumps over",
            "choices": ["the dog", "the cat", "a token"][: changes.pop("choices", 2)],
            "answer": n % 2,
            "page": f"Number {n}. In the beginning there was a {'fox' * n}. ",
        }
        for n in range(8)
    ]
    kinds: dict[str, dict[str, Any]] = {
        "multiple_choice": {"doc_to_choice": "choices", "doc_to_target": "answer"},
        "loglikelihood": {"doc_to_target": " dog"},
        "loglikelihood_rolling": {"doc_to_text": "", "doc_to_target": "{{page}}"},
        "generate_until": {
            "doc_to_target": "dog",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        },
    }
    own = {"doc_to_text": "{{text}}", **kinds[changes["output_type"]], **changes}
    write_task(directory, name, rows, metric_list=[{"metric": m} for m in metrics], **own)
    return str(directory)


def settings_maker(model: Path, tasks: Path) -> Callable[..., EvaluateConfig]:
    """Return what makes settings of an evaluation on the CPU."""

    def make(**changes: Any) -> EvaluateConfig:
        chosen = {"model": (str(model),), "tasks": (str(tasks),), "device": "cpu"}
        return EvaluateConfig(**(chosen | changes))

    return make
