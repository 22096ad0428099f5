"""The plan of a run: its steps, what they will take, and what does not fit, before any begins."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import exists
from pathlib import Path
from typing import Literal

from common.errors import OutputError
from common.table import table
from common.units import decimal_size, duration, size
from pipeline.advice import machine_advice
from pipeline.checks import Checked, check
from pipeline.costs import Cost, Costs
from pipeline.probe import Rates, probe
from pipeline.settings import RunConfig
from pipeline.state import RunState, Step
from pipeline.steps import StepSettings, steps_of
from pipeline.text import TextPlan
from predictor.collection.collect import most_bytes, trace_header

Note = Callable[[str], None]
State = Literal["done", "begun", "to do"]


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """A step as it stands.

    Attributes:
        name: the command that does the same by itself.
        state: `done` is reused; `begun` goes on.
        seconds: that it will take, None if it is done or was not estimated, as the next two.
        disk_bytes: that it will leave.
        memory_bytes: that it will hold, without what torch itself takes.
    """

    name: str
    state: State
    seconds: float | None = None
    disk_bytes: float | None = None
    memory_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan, ready for JSON.

    Attributes:
        model: as named.
        architecture: its family.
        sizes: d_model, d_ff and layers.
        text: how the text is used.
        tokenizer: which of the model's files counts.
        steps: in order.
        disk_free: bytes on the disk of the output.
        rates: what the probe measured; None where nothing is left to do.
        notes: what does not fit and which option to set, a line each.
    """

    model: str
    architecture: str
    sizes: dict[str, int]
    text: TextPlan
    tokenizer: str
    steps: tuple[PlannedStep, ...]
    disk_free: int
    rates: Rates | None
    notes: tuple[str, ...]

    @property
    def seconds(self) -> dict[str, float]:
        """Expected seconds of what is left, by step."""
        return {step.name: step.seconds or 0.0 for step in self.steps if step.state != "done"}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that has been checked and not begun.

    Attributes:
        config: its settings.
        settings: those of its commands.
        plan: what it will do.
        steps: its steps, in order.
        state: what an earlier run left.
    """

    config: RunConfig
    settings: StepSettings
    plan: Plan
    steps: Sequence[Step]
    state: RunState


def prepare(config: RunConfig, note: Note = lambda line: None) -> Prepared:
    """Check everything that can be checked before hours are spent, and plan.

    Nothing is written but the probe's files, which go again.

    Args:
        config: settings of the run.
        note: takes the commands' lines for users while the run goes on.

    Raises:
        PspError: what any of the steps would refuse of the settings, the model, the text or the
            disk; or an output that exists.
    """
    checked = check(config)
    origin = checked.checkpoint.origin
    steps = steps_of(config, origin, checked.settings, checked.text, note)
    state = RunState.read(config.out) if config.resume else RunState(config.out)
    states = dict(_states(steps, state))
    free = _check_disk(config, checked, states)
    rates, costs, notes = None, dict[str, Cost](), list(checked.notes)
    if any(each != "done" for each in states.values()):
        measured = (checked.checkpoint, checked.settings, checked.text.template)
        rates = probe(*measured, _existing(config.out))
        estimate = Costs(checkpoint=checked.checkpoint, settings=checked.settings, rates=rates)
        costs = {name: cost for name, cost in estimate.all().items() if name in states}
        notes += machine_advice(config, estimate, costs)
    shape = checked.checkpoint.shape
    plan = Plan(
        model=config.model,
        architecture=checked.checkpoint.architecture.name,
        sizes={key: getattr(shape, key) for key in ("d_model", "d_ff", "n_layers", "vocab_size")},
        text=checked.text,
        tokenizer=checked.tokenizer,
        steps=tuple(_planned(name, states[name], costs) for name in states),
        disk_free=free,
        rates=rates,
        notes=tuple(notes),
    )
    settings = checked.settings
    return Prepared(config=config, settings=settings, plan=plan, steps=steps, state=state)


def _states(steps: Sequence[Step], state: RunState) -> Iterator[tuple[str, State]]:
    """Yield every step's name and state; what comes after one that is not done is not either."""
    done = True
    for step in steps:
        done = done and state.finished(step)
        record = state.steps.get(step.name)
        begun = record is not None and not record.done
        yield step.name, "done" if done else "begun" if begun else "to do"


def _check_disk(config: RunConfig, checked: Checked, states: Mapping[str, State]) -> int:
    """Return the free bytes; refuse traces that may not fit, as `psp collect` would."""
    place = _existing(config.out)
    if not place.is_dir():
        raise OutputError(f"{config.out}: {place} is no directory", "choose another --out")
    free = shutil.disk_usage(place).free
    header = trace_header(checked.settings.collect, checked.checkpoint, checked.text.template)
    needed = most_bytes(header, header.tokens)
    if states["collect"] == "to do" and needed > free:
        fitting = int(header.tokens * free / needed) // 1000 * 1000
        raise OutputError(
            f"{config.out}: the traces need up to {decimal_size(needed)}, {decimal_size(free)} are "
            "free",
            f"pass --tokens {fitting} or fewer, or choose another --out",
        )
    return free


def _existing(out: Path) -> Path:
    return next(path for path in (out, *out.absolute().parents) if exists(path))


def _planned(name: str, state: State, costs: Mapping[str, Cost]) -> PlannedStep:
    if state == "done" or name not in costs:
        return PlannedStep(name=name, state=state)
    cost = costs[name]
    return PlannedStep(
        name=name,
        state=state,
        seconds=cost.seconds,
        disk_bytes=cost.disk,
        memory_bytes=cost.memory,
    )


def plan_table(plan: Plan) -> str:
    """Return a plan as text: a row a step, what is expected in all, and what does not fit."""
    rows = [[step.name, step.state, *_cells(step)] for step in plan.steps]
    left = [step for step in plan.steps if step.seconds is not None]
    if left:
        total = [
            duration(sum(step.seconds or 0 for step in left)),
            size(sum(step.disk_bytes or 0 for step in left)),
            size(max(step.memory_bytes or 0 for step in left)),
        ]
        rows.append(["in all", "", *total])
    sizes = ", ".join(f"{name} {number}" for name, number in plan.sizes.items())
    head = f"{plan.model}: {plan.architecture}, {sizes}"
    text = f"text: {plan.text.tokens} tokens of {plan.text.documents} documents for traces"
    text += f", {plan.tokenizer}"
    body = table(["step", "state", "about", "disk", "memory"], rows)
    free = f"{decimal_size(plan.disk_free)} of disk are free"
    return "\n".join([head, text, "", body, free, *(f"note: {line}" for line in plan.notes)])


def _cells(step: PlannedStep) -> list[str]:
    if step.seconds is None or step.disk_bytes is None or step.memory_bytes is None:
        return ["–", "–", "–"]
    return [duration(step.seconds), size(step.disk_bytes), size(step.memory_bytes)]
