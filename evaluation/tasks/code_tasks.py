"""HumanEval and MBPP with lm-eval's own prompts, and pass@1 that is computed here.

lm-eval's files of these tasks load their metric from a hub when they are opened. Here the settings
are those of the files of the installed lm-eval, only the functions that they name are others:
`evaluation.tasks.judge` runs the programs.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import EngineError
from evaluation.tasks.files import built_in, read_raw
from evaluation.tasks.judge import Limits, Verdict, judge


class Program(str):
    """A program with its completion, and what became of it.

    Attributes:
        verdict: of its run.
    """

    verdict: Verdict = "failed"


class Judged:
    """A filter of lm-eval's that runs all of a task's programs at once.

    What passes through it stays as it is, but knows its verdict.
    """

    def __init__(self, target: str, *, with_prompt: bool, limits: Limits | None = None) -> None:
        """Take the template of the tests, and whether a completion goes on with its prompt."""
        self._target, self._with_prompt, self._limits = target, with_prompt, limits

    def __call__(
        self, responses: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]
    ) -> list[list[Program]]:
        """Return lists of programs, one list for each question."""
        from lm_eval.utils import apply_template

        found: list[list[Program]] = []
        tests: list[str] = []
        for answers, doc in zip(responses, docs, strict=True):
            prompt = str(doc["prompt"]) if self._with_prompt else ""
            found.append([Program(prompt + answer) for answer in answers])
            tests.extend([apply_template(self._target, doc)] * len(found[-1]))
        flat = [program for programs in found for program in programs]
        whole = [f"{program}\n{test}" for program, test in zip(flat, tests, strict=True)]
        for program, verdict in zip(flat, judge(whole, limits=self._limits), strict=True):
            program.verdict = verdict
        return found


def _passed(*, references: Sequence[str], predictions: Sequence[Sequence[Program]]) -> float:
    """Return the share of a question's programs that passed; its tests were run by the filter."""
    programs = predictions[0]
    return sum(program.verdict == "passed" for program in programs) / len(programs)


def _metric(name: str) -> Callable[..., float]:
    def passed(references: Sequence[str], predictions: Sequence[Sequence[Program]]) -> float:
        return _passed(references=references, predictions=predictions)

    passed.__name__ = name  # lm-eval's name of the metric
    return passed


def own_config(path: Path) -> dict[str, Any] | None:
    """Return the settings of a task of HumanEval's or MBPP's, None of any other.

    Args:
        path: of its YAML, lm-eval's or one that includes lm-eval's.

    Raises:
        DataError: it cannot be read.
        EngineError: this lm-eval's files are not as this module knows them.
    """
    raw, tasks = read_raw(path), built_in()
    humaneval, mbpp = str(tasks / "humaneval/utils"), str(tasks / "mbpp/utils")
    metrics = [each.get("metric") for each in raw.get("metric_list") or []]
    if metrics == [f"{humaneval}.pass_at_k"]:
        filters = [each.get("filter_fn") for each in _functions(raw)]
        if filters != [f"{humaneval}.build_predictions"] or raw.get("repeats", 1) != 1:
            return None  # a variant that cuts the text otherwise
        return _replaced(raw, "create_test", "pass@1", with_prompt=True)
    if metrics == [f"{mbpp}.pass_at_1"] and not raw.get("filter_list"):
        config = _replaced(raw, "none", "pass_at_1", with_prompt=False)
        shots = dict(config.get("fewshot_config") or {})
        if shots.get("samples") == f"{mbpp}.list_fewshot_samples":
            shots["samples"] = _examples(tasks / "mbpp/utils.py", "list_fewshot_samples")
        return {**config, "fewshot_config": shots}
    return None


def _functions(raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [each for pipeline in raw.get("filter_list") or [] for each in pipeline["filter"]]


def _replaced(
    raw: Mapping[str, Any], name: str, metric: str, *, with_prompt: bool
) -> dict[str, Any]:
    function = Judged(raw["doc_to_target"], with_prompt=with_prompt)
    return {
        **raw,
        "metric_list": [
            {"metric": _metric(metric), "aggregation": "mean", "higher_is_better": True}
        ],
        "filter_list": [{"name": name, "filter": [{"function": "custom", "filter_fn": function}]}],
    }


def _examples(file: Path, function: str) -> list[dict[str, Any]]:
    """Return what a function of lm-eval's returns, read and not run: its file asks the hub."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            last = node.body[-1]
            if isinstance(last, ast.Return) and last.value is not None:
                return list(ast.literal_eval(last.value))
    raise EngineError(f"{file}: no {function} as lm-eval 0.4.13 has it", "install lm-eval 0.4.13")
