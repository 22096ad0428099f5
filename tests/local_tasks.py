"""Task files and their data in a test's own directory, and a model that answers by rule."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ANIMALS: list[dict[str, Any]] = [
    {
        "asked": f"Which is number {number}?",
        "among": ["ox", "wild goose", "hen"],
        "right": number % 3,
    }
    for number in range(6)
]


def write_task(
    directory: Path, name: str, rows: Sequence[Mapping[str, Any]] = ANIMALS, **settings: Any
) -> Path:
    """Write a multiple choice task, or what `settings` makes of it; those of None are left out."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl", "train": f"{name}.jsonl"}},
        "output_type": "multiple_choice",
        "training_split": "train",
        "fewshot_split": "train",
        "test_split": "test",
        "doc_to_text": "{{asked}}",
        "doc_to_choice": "among",
        "doc_to_target": "right",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
        **settings,
    }
    path = directory / f"{name}.yaml"
    kept = {key: value for key, value in task.items() if value is not None}
    path.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    return path


def made_up_model(answer: Callable[..., Any]) -> Any:
    """Return an lm-eval model whose answer to each request is a function of its arguments."""
    from lm_eval.api.model import LM

    class MadeUp(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
            return [answer(*request.args) for request in requests]

        loglikelihood_rolling = generate_until = loglikelihood

    return MadeUp()
