"""Which steps fit into the time that there is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from benchmarks.gpu.kit import Step

MODULES = {
    "smoke": "smoke",
    "operators": "operators",
    "tests": "marked_tests",
    "hybrid": "hybrid",
    "collect": "collection",
    "train": "training",
    "sparsify": "sparsify",
    "estimate": "estimate",
}
"""Stages in order of worth, and where their steps are."""

LIMITS: Mapping[str, float] = {
    "smoke": 90,
    "operators": 90,
    "tests": 150,
    "hybrid": 150,
    "collect": 60,
    "train": 60,
    "sparsify": 120,
    "estimate": 30,
}
"""Seconds that a stage may take."""

START_SECONDS = 5.0
"""That a stage's process takes to import and to wake the card."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What is going to run, and what is not.

    Attributes:
        steps: of each stage, in order.
        left_out: stage and step of those for which there is no time.
    """

    steps: Mapping[str, Sequence[Step]]
    left_out: Sequence[tuple[str, str]]


def steps_of(stage: str) -> tuple[Step, ...]:
    """Return a stage's steps in order of worth."""
    steps: tuple[Step, ...] = import_module(f"benchmarks.gpu.{MODULES[stage]}").STEPS
    return steps


def plan(
    stages: Mapping[str, Sequence[Step]],
    done: Collection[tuple[str, str]],
    seconds: float,
    scale: float = 1,
) -> Planned:
    """Return the steps that fit, each stage's within its limit and all within the time.

    Args:
        stages: steps of each, in the order in which they run.
        done: stage and step of those that need not run again.
        seconds: for all.
        scale: of the stages' limits.
    """
    chosen: dict[str, list[Step]] = {}
    left_out = []
    for stage, steps in stages.items():
        limit, used = scale * LIMITS[stage], START_SECONDS
        for step in steps:
            if (stage, step.name) in done:
                continue
            start = 0 if stage in chosen else START_SECONDS
            if used + step.seconds > limit or start + step.seconds > seconds:
                left_out.append((stage, step.name))
                continue
            chosen.setdefault(stage, []).append(step)
            used += step.seconds
            seconds -= start + step.seconds
    return Planned(steps=chosen, left_out=left_out)
