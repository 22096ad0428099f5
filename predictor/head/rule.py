"""What the second engine does with a head's predictor, on single tokens.

`scores = fc2 · fc1 · x`, nothing between the two; a row whose score is above 0 is multiplied with
x, every other row's logit is 0, not minus infinity (PowerInfer@d3ebd7c smallthinker/powerinfer/
powerinfer-cpu/src/sparse_lmhead.cpp:lmhead_profile and powerinfer_host_lmhead_f32,
powerinfer-common/include/powerinfer-type.hpp:SPARSE_PRED_THRESHOLD).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.rounding import to_q4_0, to_q8_0


@dataclass(frozen=True)
class HeadPredictor:
    """A predictor of which rows of a head a token needs.

    Attributes:
        fc1: (rank, d_model) float32.
        fc2: (vocab_size, rank) float32.
    """

    fc1: torch.Tensor
    fc2: torch.Tensor

    @property
    def rank(self) -> int:
        """Hidden units."""
        return len(self.fc1)

    def stored(self) -> HeadPredictor:
        """Return it as the engine reads it: its numbers through float16, in Q4_0."""
        return HeadPredictor(*(to_q4_0(part.half().float()) for part in (self.fc1, self.fc2)))

    def reads(self, x: torch.Tensor) -> torch.Tensor:
        """Return which rows are read, (rows, vocab_size) bool.

        Args:
            x: (rows, d_model), inputs as `to_q8_0` gives them; `self` is `stored`.
        """
        return (to_q8_0(x @ self.fc1.T) @ self.fc2.T) > 0


def predictor_share(rank: int, d_model: int, vocab_size: int) -> float:
    """Return the bytes of a predictor relative to those of its head, both in Q4_0."""
    return rank * (d_model + vocab_size) / (d_model * vocab_size)
