"""Settings of `psp estimate --cluster`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.errors import EngineError
from common.settings import Force, Option, Threads, check_settings, option_of
from predictor.collection.settings import CollectConfig
from predictor.training.settings import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What to plan, and on which cluster."""

    model: Annotated[
        str,
        Option(
            "A checkpoint, or a directory with its config.json alone.",
            "DIR|FILE.gguf",
            argument=True,
        ),
    ]
    cluster: Annotated[
        str,
        Option(
            "N nodes of a preset, of this machine or of hardware of one's own, or a description of "
            "the whole cluster (docs/estimate.md#a-cluster).",
            "N×NAME|N×this|N×FILE.yaml|FILE.yaml",
        ),
    ]
    tokens: Annotated[int, Option("Tokens to record.", least=1, most=10**15)] = 400_000
    context: Annotated[int, option_of(CollectConfig, "context")] = 512
    active: Annotated[
        float | None,
        Option(
            "Share of all neurons that are active, for the size of the traces.",
            least=0,
            most=1,
            unset="0.5, the most that is seen",
        ),
    ] = None
    recipe: Annotated[str, option_of(TrainConfig, "recipe")] = "psp"
    rank: Annotated[int | str | tuple[int, ...], option_of(TrainConfig, "rank")] = "auto"
    max_ppl_gap: Annotated[float | None, option_of(TrainConfig, "max_ppl_gap")] = None
    ffn_bytes: Annotated[float | None, option_of(TrainConfig, "ffn_bytes")] = None
    threads: Threads = 1
    out: Annotated[Path | None, Option("Write cluster.json there.", "DIR")] = None
    force: Force = False

    def __post_init__(self) -> None:
        """Refuse what the commands would."""
        check_settings(self, EngineError)
        self.training  # noqa: B018

    @property
    def training(self) -> TrainConfig:
        """The settings of the training."""
        return TrainConfig(
            traces=Path("traces"),
            out=Path("predictors"),
            recipe=self.recipe,
            rank=self.rank,
            max_ppl_gap=self.max_ppl_gap,
            ffn_bytes=self.ffn_bytes,
        )
