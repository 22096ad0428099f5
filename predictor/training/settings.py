"""Settings of `psp train-predictor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.errors import PredictorError
from common.settings import Force, Option, Resume, Seed, check_settings, layers_option

AUTO = "auto"
RANK_MULTIPLE = 32
"""Ranks that PowerInfer's kernels can run are multiples of this."""


def rank_of(text: str) -> int | str | tuple[int, ...]:
    """Return `auto`, one rank, or one for each layer such as `32,64,64`.

    Raises:
        ValueError: it is neither.
    """
    if text == AUTO:
        return text
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        raise ValueError(f"{text!r} is no rank; write auto, 32, or one for each layer.")
    ranks = tuple(map(int, parts))
    return ranks if len(ranks) > 1 else ranks[0]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training."""

    traces: Annotated[Path, Option("Directory from psp collect.", "TRACES")]
    out: Annotated[Path, Option("Directory for the predictors.", "PREDICTORS")]
    recipe: Annotated[
        str,
        Option(
            "psp: ours. svd: without training. dejavu: the published method.",
            choices=("psp", "svd", "dejavu"),
        ),
    ] = "psp"
    rank: Annotated[
        int | str | tuple[int, ...],
        Option(
            "Hidden units, multiples of 32: chosen, one for all layers, or one for each. With "
            "--recipe dejavu auto is a quarter of the hidden size.",
            "auto|N|N,N,...",
            parse=rank_of,
        ),
    ] = AUTO
    max_ppl_gap: Annotated[
        float | None,
        Option(
            "Skip neurons as far as perplexity grows by no more.",
            above=0,
            unset="0.1% if --rank is auto, else every threshold is 0",
        ),
    ] = None
    ffn_bytes: Annotated[
        float | None,
        Option("Instead: skip neurons until no more of the FFN's bytes is read.", above=0, most=1),
    ] = None
    predictor_type: Annotated[
        str,
        Option("Type that will be exported, by which bytes are counted.", choices=("f16", "q4_0")),
    ] = "f16"
    model: Annotated[
        str | None, Option("To measure with.", "DIR|HUB_ID", unset="the traces' own")
    ] = None
    data: Annotated[
        str | None, Option("Text to measure on, all of it.", unset="the traces' held-out part")
    ] = None
    eval_tokens: Annotated[int, Option("Tokens to measure on, at most.", least=64)] = 16384
    device: Annotated[str, Option("Torch device to train and run on.")] = "cpu"
    hardware: Annotated[
        str | None,
        Option(
            "With --rank auto: choose ranks for a model larger than the VRAM of this hardware "
            "(see psp estimate), where predictors' bytes cost less.",
            "NAME|FILE.yaml",
            unset="every byte costs the same",
        ),
    ] = None
    report: Annotated[
        Path | None, Option("Also write metrics, curves and plots to DIR.", "DIR")
    ] = None
    holdout: Annotated[float, Option("Share of rows held out, by document.", above=0, most=0.9)] = (
        0.1
    )
    label_top_fraction: Annotated[
        float | None,
        Option(
            "Train on each token's largest activations only (0.15 is the published clipping).",
            above=0,
            most=1,
        ),
    ] = None
    layers: Annotated[
        tuple[int, ...] | None,
        layers_option("Train these layers only; the rest later, with --resume."),
    ] = None
    precision: Annotated[
        str,
        Option(
            "Of training's matrix products; auto: bfloat16 on a GPU.",
            choices=("auto", "float32", "bfloat16"),
        ),
    ] = "auto"
    jobs: Annotated[
        int,
        Option(
            "Layers trained at once, sharing the threads; 0: one a thread if they are small.",
            least=0,
        ),
    ] = 0
    seed: Seed = 0
    resume: Resume = False
    force: Force = False

    def __post_init__(self) -> None:
        """Refuse settings that no model can have."""
        check_settings(self, PredictorError)
        for rank in self.fixed_ranks:
            if rank < RANK_MULTIPLE or rank % RANK_MULTIPLE:
                raise PredictorError(
                    f"rank {rank} cannot run in PowerInfer",
                    f"use a positive multiple of {RANK_MULTIPLE}",
                )
        if isinstance(self.rank, str) and self.rank != AUTO:
            raise PredictorError(f"rank {self.rank!r}: pass a number, a list or {AUTO}")
        if self.max_ppl_gap is not None and self.ffn_bytes is not None:
            raise PredictorError("--max-ppl-gap and --ffn-bytes are two bounds", "pass one of them")

    @property
    def fixed_ranks(self) -> tuple[int, ...]:
        """Ranks that were asked for: one for all layers, one for each, or none."""
        if isinstance(self.rank, str):
            return ()
        return (self.rank,) if isinstance(self.rank, int) else self.rank
