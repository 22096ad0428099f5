"""The size of a predictor, by which the bytes go that it costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Size:
    """What a predictor's bytes follow from.

    Attributes:
        kind: its type, `f16` or `q4_0`.
        rank: its hidden units.
    """

    kind: str
    rank: int
