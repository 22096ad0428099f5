"""`evaluation.json` of `psp evaluate`: what arms answer, and how their answers differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from common.typed_json import AtLeastOne, Count, Misfit, Positive, Range, Share
from results.parts import Amount, MachineFacts, ResultFile

ArmKind = Literal["dense", "fatrelu", "predictors", "engine", "powerinfer"]
"""What an arm is: a checkpoint as it is, one with FATReLU's thresholds, one with predictors in
place, an exported file in the embedded engine, or in PowerInfer."""


_RELATIVE = ("perplexity", "per_byte")
_UNBOUNDED = ("bleu", "chrf", "ter", "brier_score")


def is_share(metric: str, values: Iterable[float]) -> bool:
    """Whether a metric is a share of questions, to be told in per cent.

    Args:
        metric: lm-eval's name of it.
        values: of it, of every arm.
    """
    named = metric.endswith(_RELATIVE) or metric in _UNBOUNDED
    return not named and all(0 <= value <= 1 for value in values)


def is_relative(metric: str) -> bool:
    """Whether a metric's differences are relative; see `Difference`."""
    return metric.endswith(_RELATIVE)


SPARSITY = "Average Sparsity"
"""Column of published rows that is no score; arms have `EvaluationArm.sparsity`."""


@dataclass(frozen=True, kw_only=True)
class EvaluationArm:
    """Something that answers.

    Attributes:
        name: for tables; the first arm's is what differences are to.
        kind: what it is.
        model: the checkpoint or file as the user named it.
        model_hash: fingerprint of the checkpoint, or XXH3-128 of the file.
        predictors: directory of predictors, None without.
        predictors_hash: SHA-256 over the predictors' weights, None without.
        threshold: of the predictors or of FATReLU; None without, or where layers have their own.
        element_type: in which it computes, or type of most of the file's bytes.
        device: where it runs.
        batch_size: requests at once, as it was in the end.
        sparsity: share of FFN neurons that gave zero, mean over tokens and layers; None where it
            is not counted.
        seconds: that it took to answer, model loaded.
        requests: that it answered.
        tokens: that it read for them, BOS included; what it wrote is not among them.
    """

    name: str
    kind: ArmKind
    model: str
    model_hash: str
    predictors: str | None = None
    predictors_hash: str | None = None
    threshold: float | None = None
    element_type: str
    device: str
    batch_size: Count
    sparsity: Share | None = None
    seconds: Amount
    requests: Count
    tokens: Count

    @property
    def answers_per_second(self) -> float | None:
        """Speed of this harness; it says nothing of an engine's decoding."""
        return self.requests / self.seconds if self.seconds else None


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """What was asked.

    Attributes:
        name: lm-eval's.
        version: of the task, as its file says.
        output_type: lm-eval's name of the kind of its questions, such as `multiple_choice`.
        shots: examples before a question.
        questions: asked.
        of_questions: that the task has.
        metric: the one that tables show, such as `acc`.
        filter: lm-eval's name of how an answer is taken from a text.
        higher_is_better: whether more of the metric is better.
        requests_hash: SHA-256 over all requests; every arm answered these.
        chance: of the metric by guessing, mean over questions; None where nothing is chosen.
        first_prompt: what the model read of the first question, BOS aside.
    """

    name: str
    version: str
    output_type: str
    shots: Count
    questions: Annotated[int, Range(1)]
    of_questions: Annotated[int, Range(1)]
    metric: str
    filter: str
    higher_is_better: bool
    requests_hash: str
    chance: Share | None = None
    first_prompt: str


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One metric of a task or group in one arm, as lm-eval computes it.

    Attributes:
        task: its name; a group's where lm-eval aggregates one.
        arm: whose.
        metric: lm-eval's name of it.
        filter: lm-eval's name of how an answer is taken from a text.
        value: of the metric.
        standard_error: lm-eval's, None where it has none.
        questions: that it is of.
    """

    task: str
    arm: str
    metric: str
    filter: str
    value: float
    standard_error: Amount | None
    questions: Count


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How an arm's answers to a task differ from the first arm's, question by question.

    Attributes:
        task: which.
        arm: whose.
        difference: mean over questions of the metric's growth; of a perplexity its relative growth.
        standard_error: of that mean, from how questions differ; None of a single one, and of a
            metric that has no value for one (F1, BLEU), whose scores' difference this is.
        changed: share of questions whose answer is another, right or wrong; None for tasks without
            answers (perplexities).
        became_right: questions that only this arm answers rightly; None where the metric is not 0
            or 1.
        became_wrong: that only the first arm does.
        questions: compared.
    """

    task: str
    arm: str
    difference: float
    standard_error: Amount | None
    changed: Share | None
    became_right: Count | None = None
    became_wrong: Count | None = None
    questions: Count


@dataclass(frozen=True, kw_only=True)
class ColumnScore:
    """A column of a suite's table in one arm: the mean over its tasks.

    Attributes:
        column: its title, such as `Commonsense`.
        arm: whose; a published row's name where `published`.
        percent: mean of the tasks' metrics, in per cent; None where a task is missing.
        standard_error: of it, in percentage points; None where a task has none, or in the paper.
        difference: to the first arm, in percentage points; None for itself.
        difference_error: standard error of the difference, from paired questions.
        tasks: that it is the mean of.
    """

    column: str
    arm: str
    percent: float | None
    standard_error: Amount | None = None
    difference: float | None = None
    difference_error: Amount | None = None
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A row of the models' card.

    Attributes:
        name: of the model.
        percent: by column, `SPARSITY` too; the card's numbers.
    """

    name: str
    percent: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class EvaluationVersions:
    """Versions of what measured."""

    psp: str
    lm_eval: str
    python: str
    torch: str
    transformers: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that was measured.

    Attributes:
        created: ISO 8601, UTC.
        suite: name of the suite, None for tasks by name.
        seed: of few-shot examples and of what is drawn.
        limit: most questions a task, or share of them below 1; None is all.
        bos: text and id of the token that every request begins with.
        chat_template: what prompts were put into, `none` without.
        arms: the first is what the others are compared with.
        tasks: in order.
        unfinished: `ARM: TASK` for what an error left open; empty of a whole run.
        columns: of the suite's table, if it has one.
        published: rows of the card, where asked for.
        notes: what a reader must know, a line each.
    """

    created: str
    suite: str | None
    seed: Count
    limit: Positive | None
    bos: tuple[str, Count]
    chat_template: str
    machine: MachineFacts
    versions: EvaluationVersions
    arms: Annotated[tuple[EvaluationArm, ...], AtLeastOne("arm")]
    tasks: Annotated[tuple[EvaluationTask, ...], AtLeastOne("task")]
    scores: tuple[TaskScore, ...]
    differences: tuple[Difference, ...]
    unfinished: tuple[str, ...] = ()
    columns: tuple[ColumnScore, ...] = ()
    published: tuple[PublishedRow, ...] = ()
    notes: tuple[str, ...] = ()
    kind: Literal["psp.evaluation"] = "psp.evaluation"
    schema_version: Literal[1] = 1

    def __post_init__(self) -> None:
        """Refuse scores of arms that are not there."""
        names = {arm.name for arm in self.arms}
        for number, score in enumerate(self.scores):
            if score.arm not in names:
                raise Misfit(f"scores[{number}].arm", "the name of an arm")

    def score(self, task: EvaluationTask, arm: str) -> TaskScore | None:
        """Return an arm's score in the metric that tables show of a task."""
        wanted = (task.name, arm, task.metric, task.filter)
        found = (s for s in self.scores if (s.task, s.arm, s.metric, s.filter) == wanted)
        return next(found, None)

    def shares(self, task: EvaluationTask) -> bool:
        """Whether the metric that tables show of a task is a share of questions."""
        found = (self.score(task, arm.name) for arm in self.arms)
        return is_share(task.metric, [score.value for score in found if score is not None])

    def difference(self, task: str, arm: str) -> Difference | None:
        """Return how an arm's answers to a task differ, None for the first arm's."""
        return next((d for d in self.differences if (d.task, d.arm) == (task, arm)), None)


EVALUATION = ResultFile(name="evaluation.json", maker="psp evaluate", content=Evaluation)
