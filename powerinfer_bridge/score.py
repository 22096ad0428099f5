"""How well a text is predicted, window by window, by whichever engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from architectures.windows import growth_error


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
    """Return the standard error of the logarithm of a perplexity's growth, see `growth_error`.

    Args:
        before: of the text.
        after: of the same text otherwise.

    Returns:
        None where windows are unknown, or fewer than two.
    """
    if len(before.windows) != len(after.windows) or len(before.windows) < 2:
        return None
    two = torch.tensor([before.windows, after.windows], dtype=torch.float64)
    growths = two[1] - two[0]
    return growth_error(growths, torch.ones(len(growths)), growths.mean())
