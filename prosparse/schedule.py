"""When λ, the weight of the L1 term, has which value: ProSparse's stages.

Source: arXiv 2402.13516 Appendix B, Algorithm 1 (the factor of every step) and Appendix L, Tables 6
and 7 (the published schedules, the same as on the model cards).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import PspError, reason
from common.yaml_text import parse_yaml, read_yaml_text

KINDS = ("substitution", "warmup", "progressive", "decay", "sft")
_KEYS = ("kind", "lambda", "until_step")
_SHAPE = "expected stages: a list of {kind, lambda, until_step}"


class ScheduleError(PspError):
    """A schedule that cannot be followed."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training.

    Attributes:
        kind: `progressive` lets λ rise along a half-sine from the last stage's value to its own,
            every other kind holds its own: `substitution` (ReLU has just come in, λ is 0 in the
            published schedules), `warmup`, `decay` (the learning rate falls), `sft` (its own data).
        factor: λ at the stage's last step.
        until_step: number of that step, counted from 1 over all stages.
    """

    kind: str
    factor: float
    until_step: int


@dataclass(frozen=True)
class Schedule:
    """Stages in order.

    Attributes:
        stages: at least one.
    """

    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, *rows: tuple[str, float, int]) -> Schedule:
        """Return one, given kind, λ and last step of each stage."""
        return cls(tuple(Stage(kind=k, factor=f, until_step=s) for k, f, s in rows))

    def __post_init__(self) -> None:
        """Refuse what no training can follow.

        Raises:
            ScheduleError: naming the stage and the key.
        """
        if not self.stages:
            raise ScheduleError("the schedule has no stages", _SHAPE)
        start, last = 0, 0.0
        for number, stage in enumerate(self.stages):
            where = f"schedule: stage {number}"
            if stage.kind not in KINDS:
                known = ", ".join(KINDS)
                raise ScheduleError(f"{where}: kind {stage.kind!r} is unknown", f"use {known}")
            if not (math.isfinite(stage.factor) and stage.factor >= 0):
                raise ScheduleError(f"{where}: lambda is {stage.factor}, expected 0 or more")
            if stage.until_step <= start:
                raise ScheduleError(
                    f"{where}: until_step is {stage.until_step}, expected more than {start}, where "
                    "the stage begins",
                    "list cumulative steps in rising order",
                )
            if stage.kind == "progressive" and stage.factor < last:
                raise ScheduleError(
                    f"{where}: lambda falls from {last} to {stage.factor} in a progressive stage",
                    "raise it, or call the stage decay or sft",
                )
            start, last = stage.until_step, stage.factor

    @property
    def steps(self) -> int:
        """All steps."""
        return self.stages[-1].until_step

    def stage_at(self, step: int) -> int:
        """Return the number of the stage that a step belongs to, the last one from its end on.

        Args:
            step: counted from 1.
        """
        later = (n for n, stage in enumerate(self.stages) if step <= stage.until_step)
        return next(later, len(self.stages) - 1)

    def factor(self, step: int) -> float:
        """Return λ of a step (arXiv 2402.13516 Algorithm 1).

        In a progressive stage from step T0 (exclusive, value λ0) to T1 (inclusive, value λ1):
        λ0 + (λ1 − λ0)·½(1 + sin(−π/2 + π·(step − T0)/(T1 − T0))).

        Args:
            step: counted from 1.
        """
        number = self.stage_at(step)
        stage = self.stages[number]
        if stage.kind != "progressive" or step >= stage.until_step:
            return stage.factor
        start, low = 0, 0.0
        if number:
            start, low = self.stages[number - 1].until_step, self.stages[number - 1].factor
        progress = (step - start) / (stage.until_step - start)
        rise = 0.5 * (1 + math.sin(math.pi * (progress - 0.5)))
        return low + rise * (stage.factor - low)

    def start_of(self, kind: str) -> int:
        """Return the steps done before the first stage of a kind, all if there is none."""
        start = 0
        for stage in self.stages:
            if stage.kind == kind:
                return start
            start = stage.until_step
        return start

    def scaled(self, scale: float) -> Schedule:
        """Return the schedule with every boundary multiplied, λ unchanged.

        Raises:
            ScheduleError: the scale is no positive number, or a stage would lose all its steps.
        """
        if not (math.isfinite(scale) and scale > 0):
            raise ScheduleError(f"--scale is {scale}, expected a number above 0")
        ends = [round(scale * stage.until_step) for stage in self.stages]
        if any(end <= start for start, end in zip([0, *ends], ends, strict=False)):
            raise ScheduleError(
                f"--scale {scale} leaves a stage of the schedule without a step (they would end at "
                f"{', '.join(map(str, ends))})",
                "use a larger one or a schedule with fewer stages",
            )
        stages = zip(self.stages, ends, strict=True)
        return Schedule(tuple(replace(stage, until_step=end) for stage, end in stages))

    def document(self) -> list[dict[str, object]]:
        """Return the stages, ready for JSON, as `read_schedule` takes them."""
        return [
            {"kind": stage.kind, "lambda": stage.factor, "until_step": stage.until_step}
            for stage in self.stages
        ]


CARD_1B = Schedule.of(
    ("substitution", 0, 10_000),
    ("warmup", 1e-3, 15_000),
    ("progressive", 5e-3, 20_000),
    ("progressive", 5e-3, 25_000),
    ("progressive", 5e-2, 35_000),
    ("decay", 5e-2, 95_000),
    ("sft", 1e-2, 101_000),
)
"""ProSparse-MiniCPM-1B (MiniCPM-S-1B): arXiv 2402.13516 Table 7."""

CARD_7B = Schedule.of(
    ("substitution", 0, 5_000),
    ("warmup", 5e-3, 6_000),
    ("progressive", 5e-2, 10_000),
    ("progressive", 5e-2, 12_000),
    ("progressive", 2e-1, 16_000),
    ("progressive", 2e-1, 16_500),
)
"""ProSparse-LLaMA-2-7B: arXiv 2402.13516 Table 6."""

CARD_13B = Schedule.of(
    ("substitution", 0, 5_500),
    ("warmup", 5e-3, 6_750),
    ("progressive", 1e-2, 10_750),
    ("progressive", 1e-2, 11_000),
    ("progressive", 2e-2, 15_000),
    ("progressive", 2e-2, 16_000),
)
"""ProSparse-LLaMA-2-13B: arXiv 2402.13516 Table 6."""

PRESETS = {"1b": CARD_1B, "7b": CARD_7B, "13b": CARD_13B}


def find_schedule(name: str) -> Schedule:
    """Return a preset by its name, or read the YAML file of that name.

    Raises:
        ScheduleError: neither.
    """
    if name in PRESETS:
        return PRESETS[name]
    if not Path(name).suffix:
        known = ", ".join(PRESETS)
        raise ScheduleError(f"schedule {name!r} is unknown", f"use {known}, or a FILE.yaml")
    return read_schedule(Path(name))


def read_schedule(path: Path) -> Schedule:
    """Read a schedule from YAML: `stages`, a list of `kind`, `lambda` and `until_step`.

    Raises:
        ScheduleError: unreadable, not YAML, or no schedule; the line names the stage and the key.
    """
    import yaml  # type: ignore[import-untyped,unused-ignore]

    data = read_yaml_text(path, ScheduleError, "check --schedule")
    try:
        document = parse_yaml(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Besides its own errors the parser lets through those of impossible dates and encodings.
        raise ScheduleError(f"{path}: not valid YAML ({reason(error)})", _SHAPE) from error
    rows = document.get("stages") if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise ScheduleError(f"{path}: holds no stages", _SHAPE)
    return Schedule(tuple(_stage(row, f"{path}: stage {n}") for n, row in enumerate(rows)))


def _stage(row: object, where: str) -> Stage:
    if not isinstance(row, Mapping) or set(row) != set(_KEYS):
        raise ScheduleError(f"{where} is {row!r}, expected exactly the keys {', '.join(_KEYS)}")
    try:
        # YAML 1.1 takes 1e-3 for a string.
        factor = float(row["lambda"])
    except (TypeError, ValueError, OverflowError) as error:
        raise ScheduleError(
            f"{where}: lambda is {row['lambda']!r}, expected a number of 0 or more"
        ) from error
    steps = row["until_step"]
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise ScheduleError(f"{where}: until_step is {steps!r}, expected a whole number of steps")
    return Stage(kind=str(row["kind"]), factor=factor, until_step=steps)
