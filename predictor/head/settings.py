"""Settings of `psp train-predictor --head`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.errors import PredictorError
from common.head_sizes import RANK_MULTIPLE
from common.settings import (
    MODEL_FORMS,
    Device,
    Field,
    Force,
    Option,
    Resume,
    Seed,
    check_settings,
    option_of,
    text_option,
)
from common.text_sources.names import Sources
from predictor.collection.settings import CollectConfig
from predictor.training.settings import AUTO, TrainConfig, rank_of

PSP, SVD = "psp", "svd"
_MEASURED = 1024


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Settings of the training of a head's predictor."""

    out: Annotated[Path, Option("Directory for the predictor.", "HEAD")]
    traces: Annotated[
        Path | None,
        Option("Take model, text and windows from traces of psp collect.", "TRACES"),
    ] = None
    model: Annotated[
        str | None,
        Option("Hugging Face checkpoint, or GGUF file.", MODEL_FORMS, unset="the traces' own"),
    ] = None
    data: Annotated[Sources, text_option("Text to run the model on.", unset="the traces' own")] = ()
    field: Field = "text"
    tokens: Annotated[int, Option("Tokens to train and measure on, at most.", least=_MEASURED)] = (
        100_000
    )
    context: Annotated[int, option_of(CollectConfig, "context")] = 512
    recipe: Annotated[str, Option("psp: ours. svd: without training.", choices=(PSP, SVD))] = PSP
    rank: Annotated[
        int | str | tuple[int, ...],
        Option(
            "Hidden units, multiples of 32; of several, or of auto's, what reads the fewest bytes.",
            "auto|N|N,N,...",
            parse=rank_of,
        ),
    ] = AUTO
    max_ppl_gap: Annotated[
        float, Option("Leave out rows as far as perplexity grows by no more.", above=0)
    ] = 0.001
    max_changed: Annotated[
        float, Option("Share of tokens whose most probable next token may change.", above=0, most=1)
    ] = 0.005
    holdout: Annotated[float, option_of(TrainConfig, "holdout")] = 0.2
    device: Device = "auto"
    seed: Seed = 0
    resume: Resume = False
    force: Force = False

    def __post_init__(self) -> None:
        """Refuse settings that no head can have."""
        check_settings(self, PredictorError)
        for rank in self.ranks or ():
            if rank < RANK_MULTIPLE or rank % RANK_MULTIPLE:
                raise PredictorError(
                    f"rank {rank} cannot run in PowerInfer's second engine",
                    f"use a positive multiple of {RANK_MULTIPLE}",
                )
        if isinstance(self.rank, str) and self.rank != AUTO:
            raise PredictorError(f"rank {self.rank!r}: pass a number, a list or {AUTO}")
        if self.traces is None and (self.model is None or not self.data):
            raise PredictorError(
                "nothing to train on", "pass --traces TRACES, or --model and --data"
            )

    @property
    def ranks(self) -> tuple[int, ...] | None:
        """Ranks that were asked for; None if they are to be chosen."""
        if isinstance(self.rank, str):
            return None
        return (self.rank,) if isinstance(self.rank, int) else self.rank


def candidate_ranks(d_model: int) -> tuple[int, ...]:
    """Return powers of two times `RANK_MULTIPLE`, up to half of d_model."""
    ranks = [RANK_MULTIPLE]
    while 2 * ranks[-1] <= d_model // 2:
        ranks.append(2 * ranks[-1])
    return tuple(ranks)
