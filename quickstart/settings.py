"""Settings of `psp quickstart`, and the sizes that it comes in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.errors import PspError
from common.settings import Option, PowerInferBin, Seed, Threads, check_settings


@dataclass(frozen=True, kw_only=True)
class Size:
    """Everything that scales.

    Attributes:
        characters: corpus size.
        vocab_size: SentencePiece pieces.
        d_model: hidden size.
        d_ff: neurons in a layer.
        n_layers: blocks.
        n_heads: attention heads.
        n_kv_heads: key/value heads.
        context: training window, tokens.
        steps: training steps.
        batch: windows a step.
        learning_rate: peak rate.
        l1: λ, the weight of the L1 term (`prosparse.regulariser`, norm `mean`).
        trace_tokens: tokens to collect.
        rank: predictor rank.
        chunks: perplexity windows.
        generate: tokens a speed run.
        questions: of each task of an evaluation.
    """

    characters: int
    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    context: int
    steps: int
    batch: int
    learning_rate: float
    l1: float
    trace_tokens: int
    rank: int
    chunks: int
    generate: int
    questions: int


SIZES = {
    "tiny": Size(
        characters=300_000,
        vocab_size=512,
        d_model=64,
        d_ff=1024,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        context=128,
        steps=150,
        batch=8,
        learning_rate=6e-3,
        l1=1.25,
        trace_tokens=10_000,
        rank=32,
        chunks=8,
        generate=16,
        questions=10,
    ),
    "small": Size(
        characters=4_000_000,
        vocab_size=1024,
        d_model=256,
        d_ff=1024,
        n_layers=4,
        n_heads=8,
        n_kv_heads=4,
        context=256,
        steps=300,
        batch=8,
        learning_rate=4e-3,
        l1=0.0375,
        trace_tokens=50_000,
        rank=32,
        chunks=24,
        generate=64,
        questions=60,
    ),
}


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Settings of the quickstart."""

    out: Annotated[Path, Option("Directory for everything that is made.", "DIR")] = Path(
        "quickstart-out"
    )
    size: Annotated[
        str, Option("tiny: seconds, for trying. small: minutes.", choices=tuple(SIZES))
    ] = "small"
    seed: Seed = 0
    threads: Threads = 2
    powerinfer_bin: PowerInferBin = None
    evaluate: Annotated[
        bool, Option("Also ask the model, its predictors and the exported file questions.")
    ] = False

    def __post_init__(self) -> None:
        """Refuse settings out of their limits.

        Raises:
            PspError: naming the setting.
        """
        check_settings(self, PspError)
