"""The settings of a sparsification, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import PspError
from common.version import tool_version
from prosparse.regulariser import NORMS
from prosparse.schedule import Schedule

ACTIVATIONS = ("relu", "keep")
PRECISIONS = ("float32", "bfloat16")
RATES = ("cosine", "constant", "decay")
DEVICES = ("auto", "cpu")
_INDIFFERENT = ("out", "save_every", "log_every", "eval_every", "device", "force", "resume")


class SettingsError(PspError):
    """Settings that do not go together."""


@dataclass(frozen=True, kw_only=True)
class SparsifyConfig:
    """Settings of a sparsification.

    Attributes:
        model: checkpoint directory or hub id of a gated model.
        data: text to train on, see `common.documents`.
        out: directory for the sparse model; its `training/` holds what the run needs and tells.
        schedule: stages and λ.
        field: key of the text in structured sources.
        sft_data: text of the `sft` stage; None goes on with `data`.
        eval_data: held-out text for perplexity; None holds back the first windows of `data`.
        eval_windows: held-out windows, at most.
        activation: `relu` substitutes it; `keep` trains the model as it is, to compare with.
        norm: how the L1 term is normalised, see `prosparse.regulariser`.
        context: length of a training window, tokens.
        batch: windows that a device takes at once.
        accumulate: batches before a step.
        learning_rate: peak.
        rate: `cosine` to a tenth, `constant`, or `decay`: constant until the first decay stage,
            then linear to a tenth.
        warmup: share of all steps in which the learning rate rises from 0.
        weight_decay: AdamW's.
        betas: AdamW's.
        precision: type of the forward and backward pass; weights and optimiser stay float32.
        checkpointing: recompute activations in the backward pass to save memory.
        save_every: steps between checkpoints to resume from.
        log_every: steps between lines of the log.
        eval_every: steps between evaluations.
        device: `auto` takes GPUs that are there, `cpu` none.
        seed: order of the windows, and torch's.
        force: replace an existing output.
        resume: go on with an interrupted run.
    """

    model: str
    data: str
    out: Path
    schedule: Schedule
    field: str = "text"
    sft_data: str | None = None
    eval_data: str | None = None
    eval_windows: int = 32
    activation: str = "relu"
    norm: str = "mean"
    context: int = 1024
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 3e-5
    rate: str = "cosine"
    warmup: float = 0.01
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    precision: str = "float32"
    checkpointing: bool = False
    save_every: int = 500
    log_every: int = 10
    eval_every: int = 500
    device: str = "auto"
    seed: int = 0
    force: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that train nothing.

        Raises:
            SettingsError: naming the setting.
        """
        for name, choices in (
            ("activation", ACTIVATIONS),
            ("norm", NORMS),
            ("precision", PRECISIONS),
            ("rate", RATES),
            ("device", DEVICES),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise SettingsError(
                    f"{name} {value!r} is unknown", f"choose from {', '.join(choices)}"
                )
        least = {"context": 2, "batch": 1, "accumulate": 1, "eval_windows": 1}
        least |= {"save_every": 1, "log_every": 1, "eval_every": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise SettingsError(f"{name} is {getattr(self, name)}, expected at least {low}")
        if not 0 < self.learning_rate < 1:
            raise SettingsError(f"learning rate is {self.learning_rate}, expected between 0 and 1")
        if self.rate == "decay" and self.schedule.start_of("decay") == self.schedule.steps:
            raise SettingsError("rate decay needs a schedule with a decay stage", "use cosine")
        if self.sft_data and self.schedule.start_of("sft") == self.schedule.steps:
            raise SettingsError(
                "SFT data needs a schedule with an sft stage", "add one or leave it"
            )

    @property
    def training(self) -> Path:
        """Directory of what the run needs and tells."""
        return self.out / "training"

    @property
    def finished(self) -> bool:
        """Whether the model has been written, of which config.json comes last."""
        return (self.out / "config.json").exists()

    @property
    def log(self) -> Path:
        """JSON lines, see `prosparse.journal`."""
        return self.training / "log.jsonl"

    def step_windows(self, processes: int) -> int:
        """Return how many windows a step takes over all processes."""
        return self.batch * self.accumulate * processes

    def document(self, processes: int) -> dict[str, Any]:
        """Return what decides the weights, to compare with when resuming."""
        facts = {key: value for key, value in vars(self).items() if key not in _INDIFFERENT}
        facts |= {"betas": list(self.betas), "schedule": self.schedule.document()}
        facts["processes"] = processes
        return {"settings": facts, "tool_version": tool_version()}
