"""Tasks of lm-eval's, opened before any model, and what their numbers stand for."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import DataError, reason
from common.scratch import Scratch
from evaluation.tasks.factory import make_factory
from evaluation.tasks.files import built_in, read_raw, task_files
from evaluation.tasks.quiet import quiet
from evaluation.tasks.templates import compiled_once

if TYPE_CHECKING:
    from lm_eval.api.task import Task

_PATTERN = frozenset("*?[")
_METRICS = (
    *("acc", "exact_match", "pass@1", "pass_at_1", "f1", "acc_norm", "acc_bytes"),
    *("acc_mutual_info", "mcc", "word_perplexity", "perplexity", "byte_perplexity"),
)
"""Metrics in the order in which the first that a task has is its primary one."""

_BY_LENGTH = "hellaswag"
"""Tasks whose endings differ much in length; by length is also how the card's harness ranks it."""


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks that are ready to be asked.

    Attributes:
        tasks: by name, in order; each is a leaf, no group.
        groups: by name, nested ones too.
        group_map: names of the members of each group.
        requested: names of the leaves of what the user named, by what the user named.
        seed: of few-shot examples.
        notes: what a reader must know, a line each.
    """

    tasks: dict[str, Task]
    groups: dict[str, Any]
    group_map: dict[str, list[str]]
    requested: dict[str, tuple[str, ...]]
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def task_dict(self) -> dict[str, Any]:
        """What `lm_eval.evaluator.evaluate` takes."""
        return {"tasks": self.tasks, "groups": self.groups, "group_map": self.group_map}

    def reseed(self) -> None:
        """Let few-shot examples be drawn as at first; to be called before each arm."""
        for task in self.tasks.values():
            task.set_fewshot_seed(seed=self.seed)


def load_tasks(
    names: Sequence[str],
    *,
    include_path: Path | Sequence[Path] | None = None,
    seed: int = 1234,
    num_fewshot: int | Mapping[str, int] | None = None,
    allow_code: bool = False,
) -> LoadedTasks:
    """Open tasks, with all that can be wrong with them told now.

    Args:
        names: each a task, group, tag or pattern of lm-eval's, a task file in YAML, or a directory
            of such files, which stands for all tasks in it. What exists on this disk is taken for
            a path.
        include_path: directories of more task files, which go before lm-eval's own.
        seed: of few-shot examples.
        num_fewshot: examples before a question, for all tasks or by the names that were given;
            as in lm-eval, a task whose file says 0 keeps 0. The files' own by default.
        allow_code: whether Python beside the user's own task files may run, and programs that a
            model writes.

    Raises:
        DataError: an unknown name, a file that cannot be read, data that is not there, no
            questions, too few examples, and so on, each in a line that names the task.
    """
    extra = [include_path] if isinstance(include_path, Path) else list(include_path or ())
    scratch = Scratch(prefix="psp-tasks-")
    try:
        with quiet(), compiled_once():
            manager = _manager(names, extra)
            manager._factory = make_factory(allow_code=allow_code, cache=scratch.path)
            loaded = _merged(manager, _wanted(names, manager), seed)
            notes = _set_shots(loaded, num_fewshot)
            for name, task in loaded.tasks.items():
                _check_metrics(name, task)
                _check_target(name, task)
                _check_shots(name, task)
            loaded.reseed()
    except BaseException:
        scratch.close()
        raise
    whole = LoadedTasks(**{**vars(loaded), "notes": notes})
    weakref.finalize(whole, scratch.close)
    return whole


def _manager(names: Sequence[str], extra: Sequence[Path]) -> Any:
    """Return lm-eval's index; of its own 14,000 files (8 s) only where a name needs them."""
    from lm_eval.tasks import TaskManager

    directories = [Path(name) for name in names if Path(name).is_dir()]
    for directory in extra:
        if not directory.is_dir():
            raise DataError(f"{directory}: no directory of task files", "mend --include-path")
    known: set[str] = set()
    members: set[str] = set()
    files = [Path(name) for name in names if Path(name).is_file()]
    owner: dict[str, Path] = {}
    for path in [*files, *(file for each in [*extra, *directories] for file in task_files(each))]:
        raw = read_raw(path)
        if isinstance(raw.get("task"), str):
            _refuse_twin(raw["task"], path, owner)
        known |= {str(raw[key]) for key in ("task", "group") if isinstance(raw.get(key), str)}
        known |= _tags(raw, path)
        members |= set(_members(raw))
    asked = {name for name in names if not Path(name).exists()}
    for name in sorted(asked):
        if name.endswith((".yaml", ".yml")):  # no task's name, and looking among all takes 20 s
            raise DataError(f"{name}: no such file", "mend --tasks")
    return TaskManager(
        include_path=[str(each) for each in [*extra, *directories]] or None,
        include_defaults=not (asked | members) <= known,
    )


def _refuse_twin(name: str, path: Path, owner: dict[str, Path]) -> None:
    """Refuse two files of one task, of which lm-eval would ask the last alone."""
    path = path.resolve()
    first = owner.setdefault(name, path)
    if first != path and not path.is_relative_to(built_in()):
        raise DataError(f"task {name}: is in {first} and in {path}", "rename one of them")


def _tags(raw: Mapping[str, Any], path: Path) -> set[str]:
    found = raw.get("tag") or []
    tags = found if isinstance(found, list) else [found]
    if not all(isinstance(each, str) for each in tags):
        raise DataError(f"{path}: not a task file (tag: {found!r:.80} is no name)", "mend the file")
    return set(tags)


def _members(raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield names of tasks that a group's settings refer to, at any depth."""
    listed = raw.get("task")
    for each in listed if isinstance(listed, list) else []:
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping):
            if isinstance(each.get("task"), str) and "dataset_path" not in each:
                yield each["task"]
            yield from _members(each)


def _wanted(names: Sequence[str], manager: Any) -> dict[str, list[str]]:
    """Return what lm-eval is to load for each name.

    Raises:
        DataError: an unknown name, or a directory without tasks.
    """
    wanted: dict[str, list[str]] = {}
    unknown: list[DataError] = []
    for name in dict.fromkeys(names):
        path = Path(name)
        if path.is_dir():
            wanted[name] = _in_directory(path, manager)
        elif path.is_file():
            wanted[name] = [str(path.resolve())]
        elif _PATTERN & set(name):
            wanted[name] = manager.match_tasks([name])
        else:
            wanted[name] = [name] if name in manager.task_index else []
        if not wanted[name]:
            unknown.append(_unknown(name, manager))
    _raise_first(unknown, ", nor is")
    if not wanted:
        raise DataError("no tasks", "name some with --tasks, or a suite with --suite")
    return wanted


def _raise_first(errors: Sequence[DataError], so_are: str) -> None:
    """Raise the first of some errors, with the names that the others are about."""
    if not errors:
        return
    first, *others = errors
    if not others:
        raise first
    also = ", ".join(each.problem.partition(":")[0].removeprefix("task ") for each in others)
    raise DataError(f"{first.problem}{so_are} {also}", first.remedy)


def _in_directory(directory: Path, manager: Any) -> list[str]:
    """Return a directory's groups, and its tasks that are in none of them."""
    here = {
        name: read_raw(entry.yaml_path)
        for name, entry in manager.task_index.items()
        if entry.yaml_path is not None
        and Path(entry.yaml_path).resolve().is_relative_to(directory.resolve())
    }
    members = {member for raw in here.values() for member in _members(raw)}
    return [name for name in here if name not in members]


def _unknown(name: str, manager: Any) -> DataError:
    if Path(name).is_dir():
        return DataError(f"{name}: no task files (*.yaml) in it", "write some or name another")
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    what = f"did you mean {' or '.join(near)}?" if near else "see 'lm-eval ls tasks'"
    return DataError(f"task {name}: neither known to lm-eval nor a file or directory", what)


def _merged(manager: Any, wanted: Mapping[str, Sequence[str]], seed: int) -> LoadedTasks:
    loaded = LoadedTasks({}, {}, {}, {}, seed)
    owner: dict[str, str] = {}
    errors: list[DataError] = []
    for name, specs in wanted.items():
        leaves: list[str] = []
        for spec in specs:
            if spec in owner.values():
                continue
            try:
                found = _loaded(manager, spec)
            except DataError as error:
                errors.append(error)
                continue
            for leaf, task in found["tasks"].items():
                if owner.setdefault(leaf, spec) != spec:
                    problem = f"task {leaf}: named twice, by {owner[leaf]} and by {spec}"
                    raise DataError(problem, "leave one of them out")
                loaded.tasks[leaf] = task
                leaves.append(leaf)
            loaded.groups.update(found["groups"])
            loaded.group_map.update(found["group_map"])
        loaded.requested[name] = tuple(leaves)
    _raise_first(errors, "; nor can be opened:")
    return loaded


def _loaded(manager: Any, spec: str) -> Any:
    try:
        return manager.load([spec])
    except (KeyError, TypeError, ValueError) as error:  # of lm-eval, on groups that do not hold
        raise DataError(f"{spec}: cannot be opened ({reason(error)})", "mend its file") from error


def _set_shots(loaded: LoadedTasks, num_fewshot: int | Mapping[str, int] | None) -> tuple[str, ...]:
    """Set shots by the rule of `lm_eval.evaluator.simple_evaluate`, and note exceptions."""
    kept: list[str] = []
    for name, leaves in loaded.requested.items():
        shots = num_fewshot.get(name) if isinstance(num_fewshot, Mapping) else num_fewshot
        for leaf in leaves:
            task = loaded.tasks[leaf]
            own = task.get_config("num_fewshot")
            if shots is not None and own == 0 and shots != 0:
                kept.append(leaf)
            elif shots is not None and own != 0:
                task.set_config(key="num_fewshot", value=shots)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
    return tuple(f"task {name} keeps 0 shots, which its file sets" for name in kept)


def _check_metrics(name: str, task: Task) -> None:
    """Refuse a metric that neither lm-eval nor evaluate has: lm-eval would fail at the end."""
    if task.get_config("process_results") is not None:
        return
    functions = getattr(task, "_metric_fn_list", {})
    missing = [metric for metric, function in functions.items() if function is None]
    if missing:
        problem = f"task {name}: unknown metric {missing[0]}"
        raise DataError(problem, "name one of lm-eval's, or fetch it with a network first")


def _check_target(name: str, task: Task) -> None:
    """Refuse a right answer that is no choice: lm-eval would call every answer wrong."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.get_config("process_results") is not None:
        return
    doc = task.eval_docs[0]
    choices = list(task.doc_to_choice(doc))
    found = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    for each in found if isinstance(found, list) else [found]:
        if each not in choices and not (isinstance(each, int) and each < len(choices)):
            raise DataError(
                f"task {name}: the right answer to its first question is {each!r}, none of its "
                f"{len(choices)} choices",
                "mend doc_to_target: a column, the number of a choice, or its text",
            )


def _check_shots(name: str, task: Task) -> None:
    """Refuse more examples than there are; a question is none of its own."""
    shots = task.get_config("num_fewshot") or 0
    sampler = getattr(task, "sampler", None)
    if not shots or sampler is None:
        return
    own = task.config.fewshot_config.split == task.config.test_split
    there = len(sampler.df) - own
    if shots > there:
        problem = f"task {name}: {shots} shots of {max(there, 0)} examples"
        raise DataError(problem, "pass fewer with --num-fewshot")
    task.set_fewshot_seed(seed=0)
    doc = task.eval_docs[0]
    try:
        task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc))
    except Exception as error:  # of templates, on the examples
        problem = f"task {name}: its examples cannot be shown ({reason(error)})"
        raise DataError(problem, "mend its file or its data") from error


def primary_metric(task: Task) -> tuple[str, str, bool]:
    """Return the metric that tables show, its filter, and whether more of it is better.

    It is `acc`, the sum of a choice's log-likelihoods, as the card's harness ranks choices, and
    `acc_norm` for HellaSwag and its translations, where that harness takes the mean over tokens;
    without it exact match, pass@1, F1 or a perplexity; else what the task lists first. Of several
    filters it is the first.
    """
    better: dict[str, bool] = task.higher_is_better()
    order = list(_METRICS)
    if task.task_name.startswith(_BY_LENGTH):
        order.insert(0, "acc_norm")
    metric = next((each for each in order if each in better), next(iter(better)))
    filters = task.get_config("filter_list") or [{"name": "none"}]
    return metric, str(filters[0]["name"]), bool(better[metric])


def answer_of(task: Task, doc: Any, sample: Mapping[str, Any]) -> Hashable | None:
    """Return the answer that a logged sample stands for, None where it is a perplexity.

    Args:
        task: whose.
        doc: the question.
        sample: of `evaluate(log_samples=True)`, or one that was read back from JSON.

    Returns:
        For choices the index of the one that the primary metric takes; for a text what the
        filters left of it; for a log-likelihood whether the target is what greedy decoding writes.
    """
    answers = sample["filtered_resps"]
    if task.OUTPUT_TYPE == "multiple_choice":
        likelihoods = np.array([float(answer[0]) for answer in answers])
        return _chosen(primary_metric(task)[0], likelihoods, task.doc_to_choice(doc))
    if task.OUTPUT_TYPE == "generate_until":
        first = answers[0]
        return tuple(map(str, first)) if isinstance(first, list | tuple) else str(first)
    if task.OUTPUT_TYPE == "loglikelihood":
        return bool(answers[0][1])
    return None


def _chosen(metric: str, likelihoods: np.ndarray[Any, Any], choices: Sequence[str]) -> int:
    """Return the choice that lm-eval takes (`ConfigurableTask.process_results`)."""
    count = len(choices)
    if metric == "acc_mutual_info":
        return int(np.argmax(likelihoods[:count] - likelihoods[count:]))
    likelihoods = likelihoods[:count]
    if metric == "acc_norm":
        likelihoods = likelihoods / np.array([float(len(choice)) for choice in choices])
    if metric == "acc_bytes":
        likelihoods = likelihoods / np.array([float(len(choice.encode())) for choice in choices])
    return int(np.argmax(likelihoods))


def chance_of(task: Task) -> float | None:
    """Return the share of right answers by guessing, None where choices are not what is scored."""
    if task.OUTPUT_TYPE != "multiple_choice" or not primary_metric(task)[0].startswith("acc"):
        return None
    shares = []
    for doc in task.eval_docs:
        target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        right = len(target) if isinstance(target, list) else 1
        shares.append(right / len(task.doc_to_choice(doc)))
    return float(np.mean(shares))
