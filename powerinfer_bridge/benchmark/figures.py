"""From samples to figures: speeds of rounds, their spread, and ratios between arms."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from powerinfer_bridge.benchmark.sample import Sample

PhaseName = Literal["decode", "prompt"]


def round_speeds(samples: Sequence[Sample], arm: str, phase: PhaseName) -> dict[int, float]:
    """Return an arm's tokens per second by round, Σ tokens / Σ seconds over the prompts.

    A mean of the prompts' rates would weigh a fast prompt's second more than a slow one's. A round
    in which a run did not tell the phase is left out.
    """
    phases: dict[int, list[Any]] = {}
    for sample in samples:
        if sample.arm == arm:
            phases.setdefault(sample.round, []).append(getattr(sample.run, phase))
    return {
        number: sum(each.tokens for each in found) / sum(each.seconds for each in found)
        for number, found in sorted(phases.items())
        if all(each is not None for each in found)
    }


def spread(speeds: Sequence[float]) -> dict[str, Any]:
    """Return median, quartiles (linear between ranks) and range of the rounds' speeds."""
    return {
        "tokens_per_second": statistics.median(speeds),
        "quartiles": quartiles(speeds),
        "range": [min(speeds), max(speeds)],
        "rounds": len(speeds),
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the lower and the upper quartile."""
    return [float(value) for value in np.quantile(values, (0.25, 0.75))]


def speedup(samples: Sequence[Sample], arm: str, over: str) -> dict[str, Any]:
    """Return how much faster one arm decodes than another.

    The ratio is that of the medians; the quartiles are those of the ratios within a round, whose
    runs are neighbours in time and so share what else the machine did.
    """
    ours, theirs = (round_speeds(samples, name, "decode") for name in (arm, over))
    ratios = [ours[number] / theirs[number] for number in ours if number in theirs]
    return {
        "arm": arm,
        "over": over,
        "ratio": statistics.median(ours.values()) / statistics.median(theirs.values()),
        "quartiles": quartiles(ratios),
    }
