"""What one GPU was measured to do, by the stages of `python -m benchmarks.gpu`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from common.typed_json import Range
from results.parts import Amount, ResultFile


@dataclass(frozen=True, kw_only=True)
class CardFigure:
    """One thing that was measured.

    Attributes:
        stage: which part of the whole.
        step: which part of the stage.
        name: what was measured.
        value: how much.
        unit: of the value; empty for plain numbers.
        most: the aim is a value that is not above this.
        least: or not below this.
        met: whether the aim is met; None without one.
        details: what else is known of it.
    """

    stage: str
    step: str
    name: str
    value: Annotated[float, Range()]
    unit: str
    most: float | None
    least: float | None
    met: bool | None
    details: dict[str, object]

    @property
    def at_budget(self) -> tuple[str, float] | None:
        """Arm of `HYBRID_ARMS` and share of VRAM, 0 to 1, where a speed was timed at one."""
        arm, share = self.details.get("arm"), self.details.get("vram_share")
        if arm not in HYBRID_ARMS or not isinstance(share, int | float) or not 0 <= share <= 1:
            return None
        if self.value <= 0:
            return None
        return str(arm), float(share)

    @property
    def aim(self) -> str:
        """The aim in signs, empty without one."""
        ends = (("≤", self.most), ("≥", self.least))
        return ", ".join(f"{sign} {end:g}" for sign, end in ends if end is not None)


HYBRID_ARMS = (
    "hot neurons",
    "scattered neurons",
    "dense in PowerInfer",
    "dense in llama.cpp",
)
"""What the stage `hybrid` times at several budgets of VRAM, by `arm` in its figures' details."""


@dataclass(frozen=True, kw_only=True)
class StepEnd:
    """How a step went.

    Attributes:
        end: `done`; `absent`, what it needs is not there; `failed`; `stopped` at the stage's
            limit; `left out` of the time that there was.
        line: why, one line; empty for `done`.
        seconds: that it took.
    """

    stage: str
    step: str
    end: Literal["done", "absent", "failed", "stopped", "left out"]
    line: str
    seconds: Amount


@dataclass(frozen=True, kw_only=True)
class Card:
    """All that is known of a card.

    Attributes:
        machine: its names, memory, driver, and versions of programs.
        dry: measured without a card, to try the stages.
        figures: in the order in which they were measured.
        steps: the last end of each.
    """

    created: str
    machine: dict[str, object]
    dry: bool
    figures: tuple[CardFigure, ...]
    steps: tuple[StepEnd, ...]
    kind: Literal["psp.card"] = "psp.card"
    schema_version: Literal[1] = 1


CARD = ResultFile(name="card.json", maker="python -m benchmarks.gpu", content=Card)
