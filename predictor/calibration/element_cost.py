"""What a predictor's rank costs in the element type that it will be exported in."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import PredictorError

_TYPES = {"f16": (1.0, 1), "q4_0": (18 / 64, 64)}
"""Bytes of a weight relative to float16 (Q4_0 stores 32 in 18 bytes), and what export pads ranks to
a multiple of (see `gguf_export.pwri.element_types`)."""


@dataclass(frozen=True)
class ElementCost:
    """Bytes of a predictor.

    Attributes:
        name: `f16` or `q4_0`.
    """

    name: str

    def __post_init__(self) -> None:
        """Refuse other types."""
        if self.name not in _TYPES:
            raise PredictorError(
                f"predictor type {self.name!r}: expected one of {', '.join(_TYPES)}"
            )

    @property
    def fine(self) -> bool:
        """Whether small differences of large numbers survive, as offsets by a constant need."""
        return self.name == "f16"

    @property
    def width(self) -> float:
        """Bytes of a weight relative to one of the FFN in float16."""
        return _TYPES[self.name][0]

    def stored_rank(self, rank: int) -> int:
        """Return the rank in the file, padded."""
        return rank + -rank % _TYPES[self.name][1]

    def relative(self, rank: int, *, d_model: int, d_ff: int, ffn_matrices: int) -> float:
        """Return the bytes of a predictor relative to its FFN in float16."""
        weights = self.stored_rank(rank) * (d_model + d_ff)
        return self.width * weights / (ffn_matrices * d_model * d_ff)
