"""lm-eval's figures: what tasks ask, and what its own evaluator makes of the answers."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from common.errors import DataError, PspError, reason
from evaluation.arms import CheckedModel
from evaluation.backends.backend import RequestKind
from evaluation.comparison import Answered
from evaluation.settings import EvaluateConfig
from evaluation.tasks.loading import LoadedTasks, answer_of, primary_metric
from evaluation.tasks.quiet import quiet
from evaluation.tasks.templates import compiled_once
from results.evaluation import is_relative

BOOTSTRAP = 1000
"""Resamples for standard errors without a formula; lm-eval's own 100,000 take minutes."""

_CHAT_OPTIONS = {"fewshot_as_multiturn": True}
"""As `lm_eval.evaluator.simple_evaluate` has it."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What a task asks, of one kind of request.

    Attributes:
        task: its name.
        kind: of the requests.
        arguments: lm-eval's `Instance.args`, each as often as the task wants answers.
    """

    task: str
    kind: RequestKind
    arguments: tuple[tuple[Any, ...], ...]

    @property
    def digest(self) -> str:
        """SHA-256 over all of it."""
        text = json.dumps([self.kind, self.arguments], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What lm-eval makes of an arm's answers.

    Attributes:
        tasks: metrics by task, and by group where all of its tasks were answered: lm-eval's
            `results`, such as `{"piqa": {"acc,none": 0.7, "acc_stderr,none": 0.01}}`.
        questions: of each, answered.
        answered: of each task, by number of the question.
        samples: of each task, as lm-eval logs them.
        failed: what keeps lm-eval from figures, by task.
    """

    tasks: Mapping[str, Mapping[str, Any]]
    questions: Mapping[str, int]
    answered: Mapping[str, Mapping[int, Answered]]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    failed: Mapping[str, str] = field(default_factory=dict)


def questions_of(
    tasks: LoadedTasks, model: CheckedModel, config: EvaluateConfig
) -> list[Questions]:
    """Return what all tasks ask of every arm.

    Args:
        tasks: that were opened.
        model: whose chat template prompts are put into, if any.
        config: settings.

    Raises:
        PspError: a chat template that psp does not know, or a task whose questions cannot be made.
    """
    from lm_eval.evaluator_utils import get_sample_size

    lm = _model({}, model)
    chat = lm.apply_chat_template if config.apply_chat_template else None
    if chat is not None:
        lm.chat()  # which says what is wrong with it
    tasks.reseed()
    found: list[Questions] = []
    for name, task in tasks.tasks.items():
        with quiet(), compiled_once(), _told(name):
            task.build_all_requests(
                limit=get_sample_size(task, config.limit),
                apply_chat_template=chat is not None,
                chat_template=chat,
                tokenizer_name=lm.tokenizer_name if chat else "",
                **(_CHAT_OPTIONS if chat else {}),
            )
        found += _by_kind(name, task.instances)
    return found


def _by_kind(name: str, instances: Sequence[Any]) -> Iterator[Questions]:
    kinds: dict[RequestKind, list[tuple[Any, ...]]] = {}
    for each in instances:
        kinds.setdefault(each.request_type, []).extend([each.args] * (each.repeats or 1))
    for kind, arguments in kinds.items():
        yield Questions(task=name, kind=kind, arguments=tuple(arguments))


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn what a task's own data or code raises into one line that names it."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError) as error:
        raise DataError(
            f"task {name}: its questions cannot be made ({type(error).__name__}: {reason(error)})",
            "mend its file or its data",
        ) from error


def _model(known: Mapping[tuple[str, str], Any], model: CheckedModel) -> Any:
    from evaluation.language_model import KnownAnswers, chat_of

    return KnownAnswers(known, lambda: chat_of(model), model.checkpoint.fingerprint)


def score(
    tasks: LoadedTasks,
    known: Mapping[tuple[str, str], Any],
    failed: Sequence[str],
    model: CheckedModel,
    config: EvaluateConfig,
) -> Scored:
    """Let lm-eval evaluate answers that are known.

    Programs that a model wrote run here, where settings allow that. A task of whose answers no
    figures can be made, as of a metric that does not fit them, leaves the others theirs.

    Args:
        tasks: that were asked.
        known: answers by kind and key.
        failed: tasks without answers, left out with the groups that hold them.
        model: whose chat template prompts were put into, if any.
        config: settings.
    """
    whole = [name for name in tasks.tasks if name not in failed]
    try:
        return _score(tasks, whole, known, model, config)
    except PspError:
        raise
    except Exception:  # of lm-eval's metrics, or of code that a task brings
        broken: dict[str, str] = {}
        for name in whole:
            try:
                _score(tasks, [name], known, model, config)
            except Exception as error:
                broken[name] = f"{type(error).__name__}: {reason(error)}"
        if not broken:
            raise
        good = [name for name in whole if name not in broken]
        return replace(_score(tasks, good, known, model, config), failed=broken)


def _score(
    tasks: LoadedTasks,
    names: Sequence[str],
    known: Mapping[tuple[str, str], Any],
    model: CheckedModel,
    config: EvaluateConfig,
) -> Scored:
    from lm_eval.evaluator import evaluate

    whole = {name: tasks.tasks[name] for name in names}
    if not whole:
        return Scored(tasks={}, questions={}, answered={}, samples={})
    groups = {
        name: group
        for name, group in tasks.groups.items()
        if all(task.task_name in whole for task in group.get_all_tasks())
    }
    tasks.reseed()
    chat = config.apply_chat_template
    with quiet(), compiled_once(), _alone():
        found = evaluate(
            lm=_model(known, model),
            task_dict={**tasks.task_dict, "tasks": whole, "groups": groups},
            limit=config.limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=True,
            apply_chat_template=chat,
            confirm_run_unsafe_code=config.allow_code,
            **(_CHAT_OPTIONS if chat else {}),
        )
    samples = found["samples"]
    return Scored(
        tasks=found["results"],
        questions={name: len({s["doc_id"] for s in each}) for name, each in samples.items()},
        answered={name: _answered(task, samples[name]) for name, task in whole.items()},
        samples=samples,
    )


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keep lm-eval's bootstrap in this process, and its words from standard output."""
    name, before = "DISABLE_MULTIPROC", os.environ.get("DISABLE_MULTIPROC")
    os.environ[name] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if before is None:
            os.environ.pop(name)
        else:
            os.environ[name] = before


def _answered(task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[int, Answered]:
    metric, filtered, _ = primary_metric(task)
    return {
        sample["doc_id"]: Answered(
            _value(metric, sample[metric]), answer_of(task, sample["doc"], sample)
        )
        for sample in samples
        if sample["filter"] == filtered and metric in sample
    }


def _value(metric: str, found: Any) -> float | tuple[float, float] | None:
    """Return a question's value as plain numbers; lm-eval's are numpy's here and there.

    What F1, BLEU and the like are made of (labels, texts) is none.
    """
    try:
        if is_relative(metric) and isinstance(found, list | tuple):
            return float(found[0]), float(found[1])
        value = float(found)
    except (TypeError, ValueError):
        return None
    return (value, 1.0) if metric == "perplexity" else value
