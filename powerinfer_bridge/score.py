"""How well a text is predicted, window by window, by whichever engine."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Score:
    """A text's perplexity.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the scored tokens, inf beyond
            float64.
        windows: that mean of each window, nats; empty where it is not known. All windows score
            equally many tokens.
    """

    perplexity: float
    windows: tuple[float, ...] = ()


def gap_error(before: Score, after: Score) -> float | None:
    """Return the standard error of the logarithm of a perplexity's growth.

    Windows are drawn, not tokens, which hang together: it is told by how windows differ.

    Args:
        before: of the text.
        after: of the same text otherwise.

    Returns:
        None where windows are unknown, or fewer than two.
    """
    growths = [b - a for a, b in zip(before.windows, after.windows, strict=False)]
    if len(before.windows) != len(after.windows) or len(growths) < 2:
        return None
    mean = sum(growths) / len(growths)
    return math.sqrt(sum((growth - mean) ** 2 for growth in growths)) / len(growths)
