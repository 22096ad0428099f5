"""Settings of `psp estimate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.errors import EngineError
from common.settings import Force, ModelFile, Option, Threads, check_settings


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """What to estimate."""

    file: ModelFile
    hardware: Annotated[
        str,
        Option(
            "A preset (docs/estimate.md lists them), this machine's memory measured now, or a "
            "description of one's own.",
            "NAME|this|FILE.yaml",
        ),
    ]
    density: Annotated[
        float | None, Option("Share of neurons that the predictors let through.", least=0, most=1)
    ] = None
    precision: Annotated[
        float | None,
        Option(
            "With --density: share of those that are active.", least=0, most=1, unset="1, assumed"
        ),
    ] = None
    active: Annotated[
        float | None,
        Option(
            "With --density: share of all neurons that are active.",
            least=0,
            most=1,
            unset="density · precision, assumed",
        ),
    ] = None
    bench: Annotated[
        Path | None,
        Option("Instead of --density: a benchmark's results, layer by layer.", "DIR|bench.json"),
    ] = None
    vram_budget: Annotated[str | None, Option("VRAM.", "SIZE", unset="the card's less 256 MiB")] = (
        None
    )
    context: Annotated[int, Option("Tokens that the cache holds.", names=("--ctx",), least=1)] = 512
    position: Annotated[
        int | None,
        Option("Tokens in the cache when the token is decoded.", least=0, unset="half of --ctx"),
    ] = None
    threads: Threads = 1
    calibrate: Annotated[
        tuple[Path, ...],
        Option(
            "Fit the CPU to the runs of a bench.json or density.json; may be repeated.",
            "DIR",
            repeat=True,
        ),
    ] = ()
    save_hardware: Annotated[
        Path | None, Option("Write the hardware, for --hardware.", "FILE.yaml")
    ] = None
    out: Annotated[Path | None, Option("Write estimate.json there.", "DIR")] = None
    force: Force = False

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        check_settings(self, EngineError)
        if (self.density is None) == (self.bench is None):
            raise EngineError(
                "how many neurons are computed is not known",
                "pass either --density, or --bench with results of psp bench-powerinfer",
            )
        if self.bench is not None and (self.precision is not None or self.active is not None):
            raise EngineError("--precision and --active go with --density", "--bench measured them")
        if self.position is not None and self.position > self.context:
            raise EngineError(f"--position {self.position} is outside the context {self.context}")
