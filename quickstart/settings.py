"""Settings of `psp quickstart`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.settings import Option, PowerInferBin, Seed, Threads


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Settings of the quickstart."""

    out: Annotated[Path, Option(help="Directory for everything that is made.", metavar="DIR")] = (
        Path("quickstart-out")
    )
    size: Annotated[
        str,
        Option(help="tiny: seconds, for trying. small: minutes.", choices=("tiny", "small")),
    ] = "small"
    seed: Seed = 0
    threads: Threads = 2
    powerinfer_bin: PowerInferBin = None
