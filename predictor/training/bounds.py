"""What thresholds must keep to, by the settings of a training."""

from __future__ import annotations

from predictor.thresholds.choose import Bound
from predictor.training.settings import AUTO, DEJAVU, TrainConfig

_DEFAULT_GAP = 0.001


def bound_of(config: TrainConfig) -> Bound | None:
    """Return what thresholds are chosen to keep to; None where every one is 0."""
    gap = config.max_ppl_gap
    if gap is None and config.ffn_bytes is None:
        if config.rank != AUTO or config.recipe == DEJAVU.name:
            return None
        gap = _DEFAULT_GAP
    return Bound(max_ppl_gap=gap, ffn_bytes=config.ffn_bytes)
