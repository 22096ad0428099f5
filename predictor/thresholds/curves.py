"""Where a trained predictor's neurons switch on: one threshold a neuron, chosen by price.

A skipped neuron costs what the FFN's output misses, a computed one its bytes. With a price for a
computed neuron the best threshold of each neuron follows by itself, and one price for the whole
model shares the bytes out between layers. PowerInfer has one threshold for all neurons; dividing a
row of fc2 by the size of its own is the same (fc2's rows are free to scale), as long as all have
one sign: above zero neurons are computed more sparsely than training left them, below zero more
densely.

The thresholds that are measured are, in units of a neuron's mean positive logit, the numbers at
which a float32's sign, exponent or first two digits change: four in each octave, on both sides of
zero. So the leading bits of a logit say which of them it reaches, several times as fast as
comparisons. At both ends is infinity: a neuron that is always computed, and one that never is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from common.decisions import DecisionCounts
from predictor.module import Predictor, logits_of
from predictor.traces.rows import LabelledRows

_SHARED = 0.5
"""Weight of the layer's mean cost in a neuron's own: rare neurons say too little of themselves."""

_ROWS = 1024
_CURVE_ROWS = 32768
"""Training rows that thresholds are chosen on, at most."""

_PARTS = ("computed", "hits", "missed")
_BELOW, _ABOVE = (-4, 2), (-7, 3)
"""Octaves from and to which finite thresholds below and above zero reach."""

_QUARTERS = 4
_LOWER_BITS = 21
"""Bits of a float32 behind those that tell quarters of an octave."""

_BIAS = 127
"""Of a float32's exponent."""


@dataclass(frozen=True)
class Curves:
    """What each neuron of a layer computes and misses at each of its thresholds.

    Attributes:
        thresholds: (steps, d_ff) float32, on logits of raw inputs, rising, none of them 0.
        computed: (steps, d_ff) float32, share of tokens on which the neuron is computed.
        hits: (steps, d_ff) float32, share of tokens on which it is computed and active.
        missed: (steps, d_ff) float32, mean over tokens of what it adds to the residual stream where
            it is skipped, squared, relative to the stream's square.
        rows: tokens they were measured on.
    """

    thresholds: torch.Tensor
    computed: torch.Tensor
    hits: torch.Tensor
    missed: torch.Tensor
    rows: int

    def at(self, price: float, sign: int) -> OperatingPoint:
        """Return the thresholds of one sign that cost least.

        Args:
            price: of computing one neuron for one token, in the unit of `missed`.
            sign: 1 or -1.
        """
        below = int((self.thresholds[:, 0] < 0).sum())
        part = slice(below, None) if sign > 0 else slice(below)
        cost = self.missed[part] + price * self.computed[part]
        cost = (1 - _SHARED) * cost + _SHARED * cost.mean(1, keepdim=True)
        return self.choose(cost.argmin(0) + (below if sign > 0 else 0))

    def choose(self, steps: torch.Tensor) -> OperatingPoint:
        """Return what a step of each neuron, (d_ff,) int64, leads to."""
        tables = (self.thresholds, self.computed, self.missed)
        thresholds, computed, missed = (table.gather(0, steps[None])[0] for table in tables)
        density, error = float(computed.double().mean()), float(missed.double().sum())
        return OperatingPoint(steps, thresholds, density, error)

    def counts(self, steps: torch.Tensor, active: int) -> DecisionCounts:
        """Return the decisions that a step of each neuron leads to on these rows.

        Args:
            steps: (d_ff,) int64.
            active: active neurons in all.
        """
        computed, hits = (
            round(float(table.double().gather(0, steps[None]).sum()) * self.rows)
            for table in (self.computed, self.hits)
        )
        return DecisionCounts(
            decisions=self.rows * len(steps), active=active, predicted=computed, hits=hits
        )


@dataclass(frozen=True)
class OperatingPoint:
    """A layer's thresholds and what they lead to on the rows that they were chosen by.

    Attributes:
        steps: (d_ff,) int64, which of its thresholds each neuron has.
        thresholds: (d_ff,) float32, all above or all below zero.
        density: share of neurons computed.
        error: `Curves.missed` summed over neurons.
    """

    steps: torch.Tensor
    thresholds: torch.Tensor
    density: float
    error: float


def trace_curves(
    predictor: Predictor, rows: LabelledRows, index: torch.Tensor, scale: torch.Tensor
) -> Curves:
    """Measure a predictor at all thresholds.

    Args:
        predictor: rounded to float16.
        rows: the layer's rows.
        index: (n,) int64, the rows to measure on.
        scale: (d_ff,) float32, see `mean_positive`, where the rows are computed with.

    Returns:
        Curves on the CPU. On a GPU what is missed is added up in no fixed order, in float64, so
        that its last digit as float32 may differ from run to run.
    """
    d_ff, device = len(scale), rows.device
    predictor, thresholds = predictor.on(device), factors().to(device)[:, None] * scale
    tables = torch.zeros(3, (len(thresholds) + 1) * d_ff, dtype=torch.float64, device=device)
    neuron = torch.arange(d_ff, dtype=torch.int32, device=device)
    for held, part in rows.parts(index, _ROWS):
        steps = reached(logits_of(predictor, held.rows.inputs_at(part)) / scale)
        bins = steps.mul_(d_ff).add_(neuron).flatten()
        places, contributions = held.contributions(part)
        active = bins[places]
        for table, found, weights in zip(
            tables, (bins, active, active), (None, None, contributions.double()), strict=True
        ):
            table += torch.bincount(found, weights, minlength=len(table))
    shares = (tables / len(index)).view(3, -1, d_ff).cpu()
    below = shares.cumsum(1)[:, :-1]
    total = shares.sum(1)
    return Curves(
        thresholds=thresholds.cpu(),
        computed=(total[0] - below[0]).float(),
        hits=(total[1] - below[1]).float(),
        missed=below[2].float(),
        rows=len(index),
    )


def mean_positive(predictor: Predictor, rows: LabelledRows, index: torch.Tensor) -> torch.Tensor:
    """Return each neuron's mean positive logit, (d_ff,) float32, which thresholds are scaled by.

    It is where the rows are computed with.
    """
    predictor = predictor.on(rows.device)
    total, count = torch.zeros(2, len(predictor.fc2), device=rows.device)
    for held, part in rows.parts(index, _ROWS):
        logits = logits_of(predictor, held.rows.inputs_at(part))
        total += logits.clamp_min(0).sum(0)
        count += (logits > 0).sum(0)
    mean = total / count.clamp_min(1)
    # A neuron that was never predicted stays off: any threshold above zero will do.
    return torch.where(count > 0, mean, torch.ones((), device=rows.device))


@dataclass(frozen=True)
class LayerCurves:
    """A layer's curves on training rows, by which thresholds are chosen, and on held-out rows.

    Attributes:
        train: on training rows.
        holdout: on held-out rows, by which metrics are told.
        active: active neurons of all held-out rows.
    """

    train: Curves
    holdout: Curves
    active: int

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return them for a file."""
        tables: dict[str, torch.Tensor] = {"thresholds": self.train.thresholds}
        for name, curves in (("train", self.train), ("holdout", self.holdout)):
            tables |= {f"{name}.{part}": getattr(curves, part) for part in _PARTS}
            tables[f"{name}.rows"] = torch.tensor(curves.rows)
        return tables | {"active": torch.tensor(self.active)}

    @classmethod
    def read(cls, tables: Mapping[str, torch.Tensor]) -> LayerCurves:
        """Return what `tensors` gave."""

        def curves(name: str) -> Curves:
            parts = {part: tables[f"{name}.{part}"] for part in _PARTS}
            rows = int(tables[f"{name}.rows"])
            return Curves(thresholds=tables["thresholds"], rows=rows, **parts)

        return cls(curves("train"), curves("holdout"), int(tables["active"]))


def measure_layer(
    predictor: Predictor,
    rows: LabelledRows,
    train: torch.Tensor,
    holdout: torch.Tensor,
    generator: torch.Generator,
) -> LayerCurves:
    """Measure a trained predictor, rounded to float16, at all thresholds."""
    sample = train[torch.randperm(len(train), generator=generator)[:_CURVE_ROWS]]
    scale = mean_positive(predictor, rows, sample)
    held = trace_curves(predictor, rows, holdout, scale)
    active = sum(int(at.active(part).sum()) for at, part in rows.parts(holdout, 2048))
    return LayerCurves(trace_curves(predictor, rows, sample, scale), held, active)


def factors() -> torch.Tensor:
    """Return the thresholds, (steps,) float32, rising from -inf to inf."""
    quarters = 1 + torch.arange(_QUARTERS) / _QUARTERS
    below, above = (
        torch.outer(torch.exp2(torch.arange(*ends)), quarters).flatten()
        for ends in (_BELOW, _ABOVE)
    )
    end = torch.tensor([torch.inf])
    return torch.cat([-end, -below.flip(0), above, end])


def reached(values: torch.Tensor) -> torch.Tensor:
    """Return how many of the thresholds are not above each value.

    Args:
        values: float32, any shape, finite.

    Returns:
        int32 of that shape.
    """
    bits = values.view(torch.int32)
    negative = bits >> 31
    # Sign and magnitude become a whole number that rises by one from quarter to quarter.
    steps = (
        (negative & 0x7FFFFFFF).bitwise_xor_(bits).sub_(negative).bitwise_right_shift_(_LOWER_BITS)
    )
    start, end = (_QUARTERS * (_BIAS + octave) for octave in (_ABOVE[0], _BELOW[1]))
    # Every number reaches -inf.
    below = (steps + end).clamp_(0, _QUARTERS * (_BELOW[1] - _BELOW[0])).add_(1)
    above = steps.sub_(start - 1).clamp_(0, _QUARTERS * (_ABOVE[1] - _ABOVE[0]))
    return below.add_(above)
