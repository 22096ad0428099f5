"""An evaluation from settings to a document: tasks first, then arm after arm."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.errors import EngineError, OutputError, PspError, SettingsError
from common.files import refuse_existing, remove_output, write_bytes
from common.lock import locked
from common.outputs import changed_whole, drop_kept, recover, set_aside
from common.version import package_version, tool_version
from evaluation.answers import DIRECTORY, Answer, Answers, file_name, open_answers
from evaluation.arms import Arm, ArmFacts, Arms
from evaluation.asking import Asker
from evaluation.backends.backend import Answering, Backend, Spread
from evaluation.document import Asked, document
from evaluation.plan import arms_of
from evaluation.requests import request_keys
from evaluation.scoring import Questions, Scored, questions_of, score
from evaluation.settings import EvaluateConfig
from evaluation.suites.suite import Suite, open_suite
from evaluation.tasks.loading import LoadedTasks, load_tasks
from results.evaluation import EVALUATION, Evaluation

Note = Callable[[str], None]
Open = Callable[[Arm], tuple[Backend | Spread, ArmFacts]]
SAMPLES = "samples"
_OPTION = "--output-path"


@dataclass
class _Notes:
    """Lines that a reader must know, each told once."""

    tell: Note
    lines: list[str] = field(default_factory=list)

    def __call__(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)
            self.tell(line)


def evaluate(config: EvaluateConfig, note: Note = lambda line: None) -> Evaluation:
    """Ask every arm the same questions.

    Args:
        config: settings.
        note: takes lines that a reader must know, errors of single tasks included.

    Returns:
        The document, written to `config.output_path` too where there is one. Tasks that an error
        left open are named in `unfinished`.

    Raises:
        PspError: settings, tasks, checkpoints, files or programs that cannot be used, before any
            model is loaded; or the first arm could answer nothing.
    """
    if package_version("lm_eval") is None:
        raise SettingsError(
            "psp evaluate asks its questions with lm-eval, which is not installed",
            "pip install '.[eval]' in psp's directory",
        )
    notes = _Notes(note)
    arms = Arms(
        arms_of(config),
        device=config.device,
        dtype=config.dtype,
        timeout=config.timeout,
    )
    for line in arms.notes:
        notes(line)
    suite = open_suite(config)
    for line in suite.notes:
        notes(line)
    tasks = load_tasks(
        suite.names,
        include_path=config.include_path,
        seed=config.seed,
        num_fewshot=suite.shots if config.num_fewshot is None else config.num_fewshot,
        allow_code=config.allow_code,
    )
    for line in tasks.notes:
        notes(line)
    questions = questions_of(tasks, arms.first, config)
    with _claimed(config):
        with _opener(config, arms, note) as opened:
            asked = [_ask(config, arms, arm, opened, questions, notes) for arm in arms.arms]
        arms.close()
        return _finished(config, arms, suite, tasks, questions, asked, notes)


@contextmanager
def _claimed(config: EvaluateConfig) -> Iterator[None]:
    """Begin the directory of the results, or go on with it, while no other process writes it."""
    out = config.output_path
    if out is None:
        yield
        return
    with locked(out, _OPTION):
        recover(out)
        begun = (out / DIRECTORY).is_dir()
        if not (config.resume and begun):
            how = {"force": config.force, "resumable": begun}
            refuse_existing(out, marker=DIRECTORY, option=_OPTION, **how)
            set_aside(out)
        yield
        drop_kept(out)


@contextmanager
def _opener(config: EvaluateConfig, arms: Arms, note: Note) -> Iterator[Open]:
    """Return what opens arms: those of checkpoints on a cluster, if there is one."""
    if config.ray is None:
        yield arms.open
        return
    from evaluation.nodes import arms_on_nodes

    with arms_on_nodes(config, arms, note) as spread:
        yield lambda arm: spread(arm) if arm.file is None else arms.open(arm)


def _ask(
    config: EvaluateConfig,
    arms: Arms,
    arm: Arm,
    opened: Open,
    questions: Sequence[Questions],
    note: _Notes,
) -> Asked:
    """Ask an arm everything; what keeps one task from answers is told, and the others go on."""
    backend, facts = opened(arm)
    try:
        answers = _opened(config, arms, arm, facts)
        tokenizer = arms.model(arm).tokenizer
        asker = Asker(backend, tokenizer, answers, config.batch_size, config.seed, note)
        asked = sum(len(each.arguments) for each in questions)
        kept = f", {len(answers.known):,} answers are kept" if answers.known else ""
        note.tell(f"{arm.name}: {asked:,} requests{kept}")
        known: dict[tuple[str, str], Answer] = {}
        failed: list[str] = []
        for each in questions:
            title = f"{arm.name}: {each.task}"
            try:
                _require(backend, each)
                found = asker.ask(each.kind, each.arguments, title)
            except OutputError:  # what cannot be kept is asked in vain
                raise
            except PspError as error:
                note(f"{title}: {error}")
                failed.append(each.task)
                continue
            keys = request_keys(each.kind, each.arguments)
            known.update(zip([(each.kind, key) for key in keys], found, strict=True))
        return Asked(arm, facts, answers, asker.size, known, tuple(dict.fromkeys(failed)))
    finally:
        backend.close()


def _require(backend: Answering, questions: Questions) -> None:
    if questions.kind not in backend.kinds:
        raise EngineError(f"cannot answer {questions.kind}: {backend.why_not}", "leave out either")


def _opened(config: EvaluateConfig, arms: Arms, arm: Arm, facts: ArmFacts) -> Answers:
    identity = {
        "arm": arm.kind,
        **vars(facts),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "tokenizer": arms.model(arm).tokenizer.source,
        "psp": tool_version(),
        "lm_eval": package_version("lm_eval"),
    }
    return open_answers(config.output_path, arm.name, identity, resume=config.resume)


def _finished(
    config: EvaluateConfig,
    arms: Arms,
    suite: Suite,
    tasks: LoadedTasks,
    questions: Sequence[Questions],
    asked: Sequence[Asked],
    notes: _Notes,
) -> Evaluation:
    """Let lm-eval make its figures of the answers, and compare them."""
    scored = [score(tasks, each.known, each.failed, arms.first, config) for each in asked]
    asked = [_failed(each, found, notes) for each, found in zip(asked, scored, strict=True)]
    if not scored[0].tasks:
        raise EngineError(
            f"arm {asked[0].arm.name} answered no task", "see the notes for what kept it from each"
        )
    result = document(config, arms.first, suite, tasks, questions, asked, scored, notes.lines)
    if config.output_path is not None:
        logged = config.log_samples or (config.output_path / SAMPLES).exists()
        with _replaced(config.output_path, logged=logged) as out:
            if logged:
                _write_samples(out, asked, scored)
            EVALUATION.write(out, result)
    return result


@contextmanager
def _replaced(out: Path, *, logged: bool) -> Iterator[Path]:
    """Return where to write results; old ones change with their samples in one step.

    Where there are none yet, the document, written last, says that the samples are complete.
    """
    if not (logged and EVALUATION.path(out).exists()):
        yield out
        return
    with changed_whole(out) as copy:
        yield copy


def _failed(asked: Asked, scored: Scored, note: Note) -> Asked:
    """Add the tasks of whose answers no figures can be made."""
    for task, why in scored.failed.items():
        note(
            f"{asked.arm.name}: {task}: no figures can be made of its answers ({why}); mend its "
            "metrics or its code"
        )
    return replace(asked, failed=(*asked.failed, *scored.failed))


def _write_samples(out: Path, asked: Sequence[Asked], scored: Sequence[Scored]) -> None:
    """Write questions and answers as lm-eval logs them, a JSON object a line; no others stay."""
    from lm_eval.utils import handle_non_serializable

    remove_output(out / SAMPLES)
    for each, found in zip(asked, scored, strict=True):
        for task, samples in found.samples.items():
            lines = [json.dumps(sample, default=handle_non_serializable) for sample in samples]
            file = out / SAMPLES / f"{file_name(each.arm.name)}_{file_name(task)}.jsonl"
            write_bytes(file, "".join(f"{line}\n" for line in lines).encode())
