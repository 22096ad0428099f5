"""The operating point of a head's predictor: rank and price by bounds, fewest bytes first."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from predictor.head.measure import Reads, Rows, Text, always, by, fit_level, measure
from predictor.head.rule import HeadPredictor, predictor_share
from predictor.head.settings import SVD
from predictor.head.start import Moments, Wanted, start_at, wanted_at
from predictor.head.training import HeadTrainer, OnStep, weights_of
from results.head import HeadPoint

ORACLE, FREQUENCY = "oracle", "frequency"
EPOCHS, AGAIN = 2.0, 0.5
"""Passes over the rows: of a training, and from one price to the next."""

_AGAIN_RATE = 0.3
_FIRST = 32.0
"""The first price, in shares of the perplexity bound over the rows of the head."""

_BEFORE = 0.5
"""The first price of a predictor, relative to what a perfect one may cost."""

_STRIDES = (4.0, 2.0)
"""Of prices without a predictor and with one."""

_PROBES = 5
_PART = 4.0
"""The first part of the rows by frequency."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A predictor, the level that goes with it, and what both do on held-out text."""

    predictor: HeadPredictor
    level: torch.Tensor
    point: HeadPoint

    @property
    def bytes_ratio(self) -> float:
        """What a token reads relative to the head."""
        return self.point.bytes_ratio


@dataclass
class Search:
    """Tries ranks and prices.

    Attributes:
        fitted: rows of the training text to fit on.
        held_out: rows that were held out.
        ppl_head: their perplexity with all rows of the head in Q4_0.
        moments: of the inputs.
        trainer: trains on all rows of the training text.
        max_ppl_gap: bound on the growth of perplexity.
        max_changed: bound on changed tokens.
        on_step: takes the loss of each step of training.
        points: what was measured.
    """

    fitted: Text
    held_out: Text
    ppl_head: float
    moments: Moments
    trainer: HeadTrainer
    max_ppl_gap: float
    max_changed: float
    on_step: OnStep = lambda loss: None
    points: list[HeadPoint] = field(default_factory=list)
    _wanted: dict[float, Wanted] = field(default_factory=dict)
    _bearable: float = 0.0

    def __post_init__(self) -> None:
        """Begin at a guess, which `perfect` makes better."""
        self._bearable = _FIRST * self.max_ppl_gap / len(self.fitted.head)

    def at(self, method: str, rank: int) -> Found | None:
        """Return what reads the fewest bytes of a rank within the bounds, None if nothing does.

        Args:
            method: `psp` or `svd`.
            rank: hidden units.
        """
        walk = _Walk(_BEFORE * self._bearable, _STRIDES[1])
        best: Found | None = None
        predictor: HeadPredictor | None = None
        while (price := walk.next()) is not None:
            predictor = self._predictor(method, rank, price, predictor)
            found = self._measured(method, predictor, price)
            kept = found.point.keeps(self.max_ppl_gap, self.max_changed)
            walk.told(kept)
            if kept and (best is None or found.point.bytes_ratio < best.point.bytes_ratio):
                best = found
        return best

    def perfect(self) -> HeadPoint | None:
        """Return the fewest rows within the bounds that a predictor without error would read.

        What a row is worth is told by all logits, which no predictor knows.
        """
        walk = _Walk(_FIRST * self.max_ppl_gap / len(self.fitted.head), _STRIDES[0])
        best: HeadPoint | None = None
        while (price := walk.next()) is not None:
            head = self.fitted.head.float() + self._wanted_at(price).level

            def reads(x: torch.Tensor, head: torch.Tensor = head, price: float = price) -> Rows:
                return weights_of(x @ head.T, price) > 0

            point = self._point(reads, method=ORACLE, price=price)[1]
            kept = point.keeps(self.max_ppl_gap, self.max_changed)
            walk.told(kept)
            if kept and (best is None or point.rows_read < best.rows_read):
                best = point
        self._bearable = walk.best
        return best

    def _predictor(
        self, method: str, rank: int, price: float, before: HeadPredictor | None
    ) -> HeadPredictor:
        wanted = self._wanted_at(price)
        if method == SVD:
            return start_at(self.fitted.head, self.moments, wanted, rank)
        if before is None:
            start = start_at(self.fitted.head, self.moments, wanted, rank)
            return self.trainer.train(start, wanted, EPOCHS, on_step=self.on_step)
        return self.trainer.train(before, wanted, AGAIN, _AGAIN_RATE, self.on_step)

    def _wanted_at(self, price: float) -> Wanted:
        if price not in self._wanted:
            self._wanted[price] = wanted_at(self.fitted, price)
        return self._wanted[price]

    def _measured(self, method: str, predictor: HeadPredictor, price: float) -> Found:
        vocab_size, d_model = self.fitted.head.shape
        share = predictor_share(predictor.rank, d_model, vocab_size)
        level, point = self._point(
            by(predictor), method=method, rank=predictor.rank, price=price, predictor_share=share
        )
        return Found(predictor=predictor, level=level, point=point)

    def _point(
        self,
        reads: Reads,
        *,
        method: str,
        rank: int = 0,
        price: float = 0.0,
        predictor_share: float = 0.0,
    ) -> tuple[torch.Tensor, HeadPoint]:
        level = fit_level(self.fitted, reads)
        changes = measure(self.held_out, reads, level)
        point = HeadPoint(
            method=method,
            rank=rank,
            price=price,
            predictor_share=predictor_share,
            ppl_head=self.ppl_head,
            **changes,
        )
        self.points.append(point)
        return level, point

    def by_frequency(self, counts: torch.Tensor) -> HeadPoint | None:
        """Return the fewest most frequent rows that keep the bounds; they need no predictor.

        Args:
            counts: (vocab_size,) how often each token follows in the training text.
        """
        order = counts.argsort(descending=True, stable=True)
        walk, best = _Walk(_PART, stride=2), None
        while (part := walk.next()) is not None:
            chosen = torch.zeros(len(order), dtype=torch.bool, device=self.fitted.head.device)
            chosen[order[: round(len(order) / max(part, 1))]] = True
            point = self._point(always(chosen), method=FREQUENCY)[1]
            kept = point.keeps(self.max_ppl_gap, self.max_changed)
            walk.told(kept)
            if kept and (best is None or point.rows_read < best.rows_read):
                best = point
        return best


class _Walk:
    """Walks in strides to where the bounds cease to be kept, then halves the strides."""

    def __init__(self, first: float, stride: float) -> None:
        """Begin at a number; a larger one leaves out more."""
        self._at, self._stride = first, stride
        self._kept: float | None = None
        self._broken: float | None = None
        self._asked = 0

    @property
    def best(self) -> float:
        """What left out most within the bounds, or what to try next if nothing kept them."""
        return self._at if self._kept is None else self._kept

    def next(self) -> float | None:
        """Return the number to try, None when it is enough."""
        return self._at if self._asked < _PROBES else None

    def told(self, kept: bool) -> None:
        """Go on from whether the bounds were kept."""
        self._asked += 1
        if kept:
            self._kept = self._at
        else:
            self._broken = self._at
        if self._kept is None:
            self._at /= self._stride
        elif self._broken is None:
            self._at *= self._stride
        else:
            self._at = (self._kept * self._broken) ** 0.5
