"""Settings of `psp train-predictor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import PredictorError
from predictor.calibration.calibrate import Bound
from predictor.calibration.element_cost import ElementCost
from predictor.module import RANK_MULTIPLE
from predictor.training.recipes import recipe_named

AUTO = "auto"
DEFAULT_GAP = 0.001

_SMALL_LAYER = 1 << 22
"""Entries of a gate matrix below which threads do better on a layer each than on one together."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `train-predictor`.

    Attributes:
        traces: store directory.
        out: artifact directory.
        rank: hidden units of every layer, a multiple of 32; one for each; or `auto`, which chooses
            them.
        recipe: `psp`, `svd` or `dejavu`.
        max_ppl_gap: largest growth of perplexity that thresholds may cost, a fraction. With `auto`
            0.001 if no bound is given; else without a bound every threshold is 0.
        ffn_bytes: largest mean FFN bytes ratio, instead.
        predictor_type: element type that will be exported, which decides what a rank costs.
        predictor_weight: what a predictor's byte costs relative to one of a neuron, where ranks are
            chosen; see `cost_model.devices.Hardware.predictor_weight`.
        model: checkpoint to measure the gap with; None takes the one that traces were made of.
        data: text to measure it on, in full; None takes the traces' own held-out documents.
        eval_tokens: tokens to measure it on, at most.
        device: torch device to train on, and of that model.
        precision: type of training's matrix products: `float32`, `bfloat16`, or `auto`, which is
            bfloat16 on a GPU.
        layers: layers of the traces to train, ascending; None trains all.
        jobs: layers trained at once, sharing the threads; 0 takes one a thread where layers are
            small and the device is the CPU, else 1.
        holdout: share of rows held out, by document.
        label_top_fraction: train only on each token's largest activations, at most this fraction
            of neurons (0.15 is the published clipping); None trains on all.
        seed: seed of holdout, start and order.
        force: replace an existing artifact.
        resume: go on at the first missing layer.
    """

    traces: Path
    out: Path
    rank: int | str | tuple[int, ...]
    recipe: str = "psp"
    max_ppl_gap: float | None = None
    ffn_bytes: float | None = None
    predictor_type: str = "f16"
    predictor_weight: float = 1.0
    model: str | None = None
    data: str | None = None
    eval_tokens: int = 16384
    device: str = "cpu"
    precision: str = "auto"
    layers: tuple[int, ...] | None = None
    jobs: int = 0
    holdout: float = 0.1
    label_top_fraction: float | None = None
    seed: int = 0
    force: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that no model can have."""
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
        if not 0 < self.predictor_weight < float("inf"):
            raise PredictorError(
                f"predictor weight {self.predictor_weight:g}: expected a number above 0"
            )
        ElementCost(self.predictor_type)
        recipe_named(self.recipe)

    @property
    def fixed_ranks(self) -> tuple[int, ...]:
        """Ranks that were asked for: one for all layers, one for each, or none."""
        if isinstance(self.rank, str):
            return ()
        return (self.rank,) if isinstance(self.rank, int) else self.rank

    @property
    def bound(self) -> Bound | None:
        """What thresholds must keep to."""
        gap = self.max_ppl_gap
        if gap is None and self.ffn_bytes is None:
            if self.rank != AUTO:
                return None
            gap = DEFAULT_GAP
        return Bound(max_ppl_gap=gap, ffn_bytes=self.ffn_bytes)

    @property
    def dtype(self) -> torch.dtype:
        """Type of training's matrix products."""
        automatic = "float32" if torch.device(self.device).type == "cpu" else "bfloat16"
        name = automatic if self.precision == "auto" else self.precision
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]

    def jobs_for(self, d_model: int, d_ff: int) -> int:
        """Return how many layers of this size are trained at once."""
        if self.jobs:
            return self.jobs
        alone = torch.device(self.device).type != "cpu" or d_model * d_ff > _SMALL_LAYER
        return 1 if alone else torch.get_num_threads()
