"""Settings of `psp serve-check`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.settings import Option


@dataclass(frozen=True, kw_only=True)
class ServeCheckConfig:
    """What vLLM is to serve, and how."""

    model: Annotated[Path, Option(metavar="DIR", argument=True)]
    tensor_parallel_size: Annotated[
        int, Option("Parts that vLLM is to cut the model into.", least=1)
    ] = 1
