"""The benchmarks by which the cards of ProSparse and MiniCPM-S judge their models.

Groups, shots and how answers are taken are those that the card states (Evaluation Results:
https://huggingface.co/SparseLLM/prosparse-llama-2-7b, the same text at
https://huggingface.co/openbmb/MiniCPM-S-1B-sft): choices of PIQA, SIQA, HellaSwag, WinoGrande,
COPA, BoolQ, LAMBADA, TyDi QA and AGI-Eval by perplexity, answers to GSM8K, MMLU and BBH generated.
Which of lm-eval's tasks is nearest to what its harness does, and where they differ, is in
docs/evaluate-tasks.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from results.evaluation import PublishedRow


@dataclass(frozen=True)
class SuiteTask:
    """A task or group of lm-eval's.

    Attributes:
        name: lm-eval's.
        shots: examples before a question.
    """

    name: str
    shots: int


@dataclass(frozen=True)
class Column:
    """A column of the card's table: the mean of its tasks' primary metrics, in per cent.

    Attributes:
        title: the card's.
        tasks: of equal weight.
    """

    title: str
    tasks: tuple[SuiteTask, ...]


def _zero_shot(*names: str) -> tuple[SuiteTask, ...]:
    return tuple(SuiteTask(name, 0) for name in names)


CARD: tuple[Column, ...] = (
    Column("Code Generation", (SuiteTask("humaneval", 0), SuiteTask("mbpp", 3))),
    Column(
        "Commonsense Reasoning",
        _zero_shot("piqa", "social_iqa", "hellaswag", "winogrande", "copa"),
    ),
    Column("Reading Comprehension", _zero_shot("boolq", "lambada_openai", "tydiqa_goldp_en")),
    Column("GSM8K", (SuiteTask("gsm8k", 8),)),
    Column("MMLU", (SuiteTask("mmlu_generative", 5),)),
    Column("BBH", (SuiteTask("bbh_fewshot", 3),)),
    Column("AGI-Eval", _zero_shot("agieval")),
)
"""In the card's order."""

AVERAGE = "Average"
"""Column of the mean of all others."""

CODE_TASKS = ("humaneval", "mbpp")
"""Which run what a model writes."""


def card_tasks(*, allow_code: bool) -> dict[str, int]:
    """Return the names of the suite's tasks and their shots, code tasks only where allowed."""
    return {
        task.name: task.shots
        for column in CARD
        for task in column.tasks
        if allow_code or task.name not in CODE_TASKS
    }


def _row(name: str, average: float, *percent: float) -> PublishedRow:
    titles = [column.title for column in CARD]
    return PublishedRow(
        name=name, percent={AVERAGE: average, **dict(zip(titles, percent, strict=True))}
    )


PUBLISHED: tuple[PublishedRow, ...] = (
    _row("LLaMA2-7B", 37.96, 16.37, 69.59, 61.87, 12.96, 44.45, 32.96, 27.53),
    _row("ReluLLaMA-7B", 37.62, 15.85, 69.64, 70.54, 5.84, 38.64, 35.07, 27.73),
    _row("ProSparse-7B*", 38.31, 19.47, 66.29, 63.33, 12.74, 45.21, 33.59, 27.55),
    _row("ProSparse-7B", 38.46, 19.42, 66.27, 63.50, 12.13, 45.48, 34.99, 27.46),
    _row("LLaMA2-13B", 44.06, 20.19, 72.58, 71.55, 22.21, 54.69, 37.89, 29.33),
    _row("ReluLLaMA-13B", 42.74, 20.19, 70.44, 73.29, 18.50, 50.58, 37.97, 28.22),
    _row("ProSparse-13B*", 45.07, 29.03, 69.75, 67.54, 25.40, 54.78, 40.20, 28.76),
    _row("ProSparse-13B", 44.90, 28.42, 69.76, 66.91, 26.31, 54.35, 39.90, 28.67),
    _row("MiniCPM-1B", 44.44, 36.85, 63.67, 60.90, 35.48, 50.44, 35.03, 28.71),
    _row("MiniCPM-S-1B*", 44.72, 41.38, 64.55, 60.69, 34.72, 49.36, 34.04, 28.27),
    _row("MiniCPM-S-1B", 44.72, 42.04, 64.37, 60.73, 34.57, 49.51, 34.08, 27.77),
)
"""The card's table. `*` is a model before its activation thresholds were shifted, in plain ReLU.
The 1B rows are called ProSparse-1B on the cards of the 7B and the 13B model."""

PUBLISHED_SPARSITY: dict[str, float] = {
    "ReluLLaMA-7B": 66.98,
    "ProSparse-7B*": 88.11,
    "ProSparse-7B": 89.32,
    "ReluLLaMA-13B": 71.56,
    "ProSparse-13B*": 87.97,
    "ProSparse-13B": 88.80,
    "MiniCPM-S-1B*": 86.25,
    "MiniCPM-S-1B": 87.89,
}
"""Average sparsity of the same table, in per cent."""
