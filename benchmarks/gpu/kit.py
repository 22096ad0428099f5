"""What every stage shares: where it runs, what it may use, and how it tells what it measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path


class Absent(Exception):
    """What a step needs and this machine does not have, in one line."""


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What steps work with.

    Attributes:
        out: directory of the results; steps keep files in `work`.
        device: `cuda`, or `cpu` in a dry run.
        dry: sizes that two cores of a CPU do in seconds; the same code.
        model: a trained ReGLU LLaMA, a Hugging Face directory with its `tokenizer.model`.
        data: its training text.
        eval_data: its held-out text.
        powerinfer: directory of PowerInfer's programs.
        llama_cpp: directory of llama.cpp's programs.
    """

    out: Path
    device: str
    dry: bool
    model: Path
    data: Path
    eval_data: Path
    powerinfer: Path | None = None
    llama_cpp: Path | None = None

    @property
    def work(self) -> Path:
        """Where steps keep files, one directory for all."""
        path = self.out / "work"
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def tokenizer(self) -> Path:
        """The model's SentencePiece file."""
        return self.model / "tokenizer.model"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One thing that was measured.

    Attributes:
        name: what, with all that tells it from others of its step.
        value: how much.
        unit: of the value, such as `s` or `×`; empty for plain numbers.
        most: the aim is a value that is not above this.
        least: or not below this.
        details: what else is known of it, JSON-ready.
    """

    name: str
    value: float
    unit: str = ""
    most: float | None = None
    least: float | None = None
    details: Mapping[str, object] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the aim is met, None without one."""
        if self.most is None and self.least is None:
            return None
        above = self.least is None or self.value >= self.least
        return above and (self.most is None or self.value <= self.most)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A part of a stage.

    Attributes:
        name: unique in its stage.
        seconds: that it takes on an H100, to plan by.
        run: measures; every figure is kept as soon as it is there.
    """

    name: str
    seconds: float
    run: Callable[[Kit], Iterator[Figure]]
