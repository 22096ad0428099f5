"""Settings of `psp evaluate`; options that lm-eval has too bear lm-eval's names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cluster.settings import RayAddress, RayCpus, RayGpus, Verbose
from common.errors import SettingsError
from common.settings import (
    MODEL_FORMS,
    Device,
    Force,
    Option,
    Resume,
    Seed,
    check_settings,
    numbers_of,
)

SUITES = ("card", "tiny")


def names_of(text: str) -> tuple[str, ...]:
    """Return names such as `piqa,boolq`.

    Raises:
        ValueError: there is none.
    """
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise ValueError(f"{text!r} names no task; write piqa,boolq.")
    return names


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of an evaluation."""

    model: Annotated[
        tuple[str, ...],
        Option(
            "Hugging Face checkpoint, or GGUF file. Repeatable: the first is what all others are "
            "compared with.",
            MODEL_FORMS,
            repeat=True,
        ),
    ]
    tasks: Annotated[
        tuple[str, ...],
        Option(
            "lm-eval's tasks, groups or tags, YAML files, or a directory of them.",
            "NAME,FILE,DIR,...",
            parse=names_of,
        ),
    ] = ()
    suite: Annotated[
        str | None,
        Option(
            "card: the benchmarks of the models' card, and its table. tiny: four small tasks that "
            "need no hub.",
            choices=SUITES,
        ),
    ] = None
    data: Annotated[
        Path | None,
        Option(
            "Held-out text that the suite tiny is made of.",
            "FILE",
            unset="source files of this Python's library that no quickstart trains on",
        ),
    ] = None
    include_path: Annotated[Path | None, Option("Also find tasks in this directory.", "DIR")] = None
    predictors: Annotated[
        tuple[Path, ...],
        Option(
            "Also answer with these predictors in place, which mask neurons as PowerInfer does. "
            "Repeatable.",
            "PREDICTORS",
            repeat=True,
        ),
    ] = ()
    thresholds: Annotated[
        tuple[float, ...],
        Option(
            "Also answer with FATReLU with each of these thresholds; 0 is ReLU.",
            "T,T,...",
            parse=numbers_of,
        ),
    ] = ()
    gguf: Annotated[
        tuple[Path, ...],
        Option(
            "Also answer with this exported file in the embedded engine. Repeatable.",
            "NAME.powerinfer.gguf",
            repeat=True,
        ),
    ] = ()
    powerinfer_bin: Annotated[
        Path | None,
        Option("Also let PowerInfer itself, of this directory, answer with each --gguf.", "DIR"),
    ] = None
    timeout: Annotated[
        float,
        Option("Longest that PowerInfer may take for one answer or to load, seconds.", above=0),
    ] = 3600.0
    limit: Annotated[
        float | None, Option("Ask so many questions a task; below 1, that share.", above=0)
    ] = None
    num_fewshot: Annotated[
        int | None, Option("Examples before a question.", least=0, unset="the task's own")
    ] = None
    batch_size: Annotated[int, Option("Requests at once; halved where memory ends.", least=1)] = 8
    dtype: Annotated[
        str,
        Option(
            "Type to compute in; auto: float32 on the CPU, else the checkpoint's.",
            choices=("auto", "float32", "float16", "bfloat16"),
        ),
    ] = "auto"
    apply_chat_template: Annotated[
        bool, Option("Put prompts in the chat model's format, if psp knows it (MiniCPM's).")
    ] = False
    log_samples: Annotated[
        bool, Option("Also write every question and answer below --output-path.")
    ] = False
    output_path: Annotated[
        Path | None, Option("Directory for the results, and for answers to go on from.", "DIR")
    ] = None
    allow_code: Annotated[
        bool,
        Option("Run code that tasks bring and programs that the model writes. It is no sandbox."),
    ] = False
    reference: Annotated[
        bool, Option("Print the card's published rows beside the suite card's.")
    ] = False
    device: Device = "auto"
    ray: RayAddress = None
    ray_cpus: RayCpus = 1
    ray_gpus: RayGpus = 0.0
    verbose: Verbose = False
    seed: Seed = 0
    resume: Resume = False
    force: Force = False

    def __post_init__(self) -> None:
        """Refuse settings that ask nothing.

        Raises:
            SettingsError: naming the setting.
        """
        check_settings(self, SettingsError)
        if bool(self.tasks) == bool(self.suite):
            raise SettingsError("expected either --tasks or --suite", "pass one of them")
        if not self.model:
            raise SettingsError("expected --model", "pass a checkpoint")
        for threshold in self.thresholds:
            if not 0 <= threshold < math.inf:
                raise SettingsError(
                    f"--thresholds: {threshold:g} is no threshold of FATReLU",
                    "pass finite numbers of 0 (ReLU) or more",
                )
        if self.limit is not None and self.limit > 1 and self.limit % 1:
            raise SettingsError(
                f"--limit {self.limit:g} is neither a count nor a share", "pass 100 or 0.1"
            )
        if self.powerinfer_bin is not None and not self.gguf:
            raise SettingsError("--powerinfer-bin has nothing to run", "pass --gguf too")
        if self.log_samples and self.output_path is None:
            raise SettingsError("--log-samples has nowhere to write", "pass --output-path too")
        if self.data is not None and self.suite != "tiny":
            raise SettingsError("--data is of the suite tiny", "pass --suite tiny too")
        if self.reference and self.suite != "card":
            raise SettingsError("--reference is of the card's table", "pass --suite card too")
        for name in ("model", "predictors", "gguf", "thresholds"):
            values = [str(value) for value in getattr(self, name)]
            if len(set(values)) < len(values):
                raise SettingsError(f"--{name}: the same is given twice", "leave one out")
