"""Settings of `psp doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.settings import LLAMA_CPP_VARIABLE, Option, PowerInferBin


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What to look at beside the machine; what is None is not looked at.

    Attributes:
        timeout: longest that a program may take to start, seconds.
    """

    file: Annotated[Path | None, Option(metavar="[NAME.powerinfer.gguf]", argument=True)] = None
    powerinfer_bin: PowerInferBin = None
    llama_cpp_bin: Annotated[
        Path | None, Option("Directory of llama.cpp's programs.", "DIR", envvar=LLAMA_CPP_VARIABLE)
    ] = None
    model: Annotated[Path | None, Option("Checkpoint to look at too.", "DIR|FILE.gguf")] = None
    out: Annotated[
        Path | None, Option("Where outputs will go.", "DIR", unset="beside the file, or here")
    ] = None
    timeout: float = 60.0

    @property
    def outputs(self) -> Path:
        """Where outputs will go."""
        return self.out or (self.file.parent if self.file is not None else Path())
