"""Settings of `psp sparsify` and `psp sparsity`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from common.errors import SparsityError
from common.settings import (
    Device,
    Field,
    Force,
    ModelName,
    Option,
    Resume,
    Seed,
    check_settings,
    numbers_of,
    text_option,
)
from common.text_sources.names import Sources, is_piped, recorded
from common.typed_json import plain
from common.version import tool_version
from prosparse.schedule import CARD_1B, Schedule, find_schedule

_TEXTS = ("data", "sft_data", "eval_data")
_INDIFFERENT = ("out", "save_every", "log_every", "eval_every", "device", "force", "resume")


@dataclass(frozen=True, kw_only=True)
class SparsifyConfig:
    """Settings of a sparsification.

    Attributes:
        out: its `training/` holds what the run needs and tells.
        norm: see `prosparse.regulariser`.
        weight_decay: AdamW's.
        betas: AdamW's.
    """

    model: ModelName
    data: Annotated[Sources, text_option("Text to train on.")]
    field: Field = "text"
    out: Annotated[Path, Option("Directory for the sparse model.", "DIR")]
    schedule: Annotated[
        Schedule,
        Option(
            "Stages and lambda: a published schedule or your own.",
            "1b|7b|13b|FILE.yaml",
            parse=find_schedule,
            unset="1b",
        ),
    ] = CARD_1B
    sft_data: Annotated[Sources, text_option("Text of the sft stage.", unset="--data")] = ()
    eval_data: Annotated[
        Sources,
        text_option("Held-out text for perplexity.", unset="the beginning of --data"),
    ] = ()
    eval_windows: Annotated[int, Option("Held-out windows, at most.", least=1)] = 32
    activation: Annotated[
        str,
        Option("keep: train on without substitution, to compare with.", choices=("relu", "keep")),
    ] = "relu"
    norm: Annotated[
        str,
        Option(
            "L1 of a token in a layer: mean over neurons, or their sum.", choices=("mean", "sum")
        ),
    ] = "mean"
    context: Annotated[int, Option("Length of a window, tokens.", least=2)] = 1024
    batch: Annotated[int, Option("Windows that a device takes at once.", least=1)] = 8
    accumulate: Annotated[int, Option("Batches before a step.", least=1)] = 1
    learning_rate: Annotated[float, Option("Its peak.", above=0, below=1)] = 3e-5
    rate: Annotated[
        str,
        Option(
            "Learning rate; decay: constant, then linear from the decay stage on.",
            choices=("cosine", "constant", "decay"),
        ),
    ] = "cosine"
    warmup: Annotated[
        float, Option("Share of steps in which the learning rate rises from 0.", least=0, below=1)
    ] = 0.01
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    precision: Annotated[
        str, Option("Type of the passes; weights stay float32.", choices=("float32", "bfloat16"))
    ] = "float32"
    checkpointing: Annotated[bool, Option("Recompute activations to save memory.")] = False
    save_every: Annotated[int, Option("Steps between checkpoints.", least=1)] = 500
    log_every: Annotated[int, Option("Steps between lines of the log.", least=1)] = 10
    eval_every: Annotated[int, Option("Steps between evaluations.", least=1)] = 500
    device: Annotated[str, Option("auto: GPUs if there are any.", choices=("auto", "cpu"))] = "auto"
    seed: Seed = 0
    resume: Resume = False
    force: Force = False

    def __post_init__(self) -> None:
        """Refuse settings that train nothing.

        Raises:
            SparsityError: naming the setting.
        """
        check_settings(self, SparsityError)
        if self.rate == "decay" and self.schedule.start_of("decay") == self.schedule.steps:
            raise SparsityError("rate decay needs a schedule with a decay stage", "use cosine")
        if self.sft_data and self.schedule.start_of("sft") == self.schedule.steps:
            raise SparsityError(
                "SFT data needs a schedule with an sft stage", "add one or leave it"
            )
        if sum(map(is_piped, self.texts)) > 1:
            raise SparsityError("standard input is one text only", "pass the others as files")

    @property
    def texts(self) -> tuple[Sources, ...]:
        """Sources of all texts."""
        return self.data, self.sft_data, self.eval_data

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
        """JSON lines, see `prosparse.training_log`."""
        return self.training / "log.jsonl"

    def step_windows(self, processes: int) -> int:
        """Return how many windows a step takes over all processes."""
        return self.batch * self.accumulate * processes

    def document(self, processes: int) -> dict[str, Any]:
        """Return what decides the weights, to compare with when resuming."""
        facts = {key: value for key, value in vars(self).items() if key not in _INDIFFERENT}
        facts |= {"betas": list(self.betas), "schedule": self.schedule.document()}
        facts |= {name: recorded(facts[name]) for name in _TEXTS}
        facts["processes"] = processes
        return {"settings": plain(facts), "tool_version": tool_version()}


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """Settings of a measurement, and of a search where `max_ppl_gap` is given."""

    model: ModelName
    data: Annotated[Sources, text_option("Held-out text to run the model on.")]
    field: Field = "text"
    tokens: Annotated[int, Option("Tokens to run, at most.", least=64)] = 16384
    context: Annotated[int, Option("Longest window, tokens.", least=2)] = 512
    thresholds: Annotated[
        tuple[float, ...],
        Option(
            "Also measure FATReLU with each of these thresholds; 0 is ReLU.",
            "T,T,...",
            parse=numbers_of,
        ),
    ] = ()
    max_ppl_gap: Annotated[
        float | None,
        Option(
            "Search the threshold with most sparsity that lets perplexity grow by no more "
            "than this over ReLU, such as 1%.",
            above=0,
        ),
    ] = None
    per_layer: Annotated[bool, Option("Search a threshold for each layer.")] = False
    out: Annotated[
        Path | None, Option("Write the model with the threshold that was found.", "DIR")
    ] = None
    device: Device = "auto"
    force: Force = False

    def __post_init__(self) -> None:
        """Refuse thresholds and bounds that are none.

        Raises:
            SparsityError: naming it.
        """
        check_settings(self, SparsityError)
        for threshold in self.thresholds:
            if not 0 <= threshold < math.inf:
                raise SparsityError(
                    f"--thresholds: {threshold:g} is no threshold of FATReLU",
                    "pass finite numbers of 0 (ReLU) or more",
                )
        if self.max_ppl_gap == math.inf:
            raise SparsityError(
                f"--max-ppl-gap is {self.max_ppl_gap:g}, expected a finite number above 0",
                "1% allows perplexity to grow by a hundredth",
            )
