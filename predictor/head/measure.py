"""A head's predictor on text: the level that goes with it, and what it changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypedDict

import torch

from common.rounding import to_q8_0
from predictor.head.inputs import HeadInputs
from predictor.head.output_head import batches, exported_head
from predictor.head.price import LinearFit, best_level
from predictor.head.rule import HeadPredictor

Rows = torch.Tensor
"""Which rows of the head are read, (rows, vocab_size) bool."""

Reads = Callable[[torch.Tensor], Rows]
"""Tells it of (rows, d_model) inputs in Q8_0."""


class Changes(TypedDict):
    """What rows that are left out change, as in `results.head.HeadPoint`."""

    rows_read: float
    ppl_levelled: float
    ppl_predicted: float
    standard_error: float
    kl_divergence: float
    ppl_renormalised: float
    missed: float
    changed: float


_STEPS = 30
_SPREAD = 0.3
"""Standard deviation that the offset has before the text is looked at."""

_RIDGE = 0.1
"""Of the level, in mean second moments: a better fit has larger numbers, and the head's own are
rounded to 16 steps of what is largest in a block (docs/log.md, 2026-11-28)."""


@dataclass(frozen=True)
class Text:
    """Rows of recorded inputs and the head that reads them.

    Attributes:
        rows: the recorded inputs.
        head: (vocab_size, d_model), on the device to compute on.
    """

    rows: HeadInputs
    head: torch.Tensor

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield inputs in Q8_0, (n, d_model) float32, and the tokens that follow, (n,) int64."""
        for chosen in batches(torch.arange(len(self.rows)), len(self.head)):
            part = self.rows.part(chosen)
            x = part.inputs.to(self.head.device).float()
            yield to_q8_0(x), part.following.to(self.head.device)


def perplexity(text: Text) -> float:
    """Return the perplexity with all rows of the head in Q4_0, no level in them."""
    head, total = exported_head(text.head, None), 0.0
    for x, following in text.batches():
        logits = x @ head.T
        losses = logits.logsumexp(1) - logits.gather(1, following[:, None])[:, 0]
        total += float(losses.double().sum())
    return math.exp(total / len(text.rows))


def fit_level(text: Text, reads: Reads) -> torch.Tensor:
    """Return what to add to every row of the head, for 0 to stand where left-out rows lie.

    The direction is that of least squares over tokens. How far it goes is what the text's own next
    tokens say: whether they are left out as often as their logits of 0 tell.

    Args:
        text: rows that were trained on.
        reads: which rows are read.

    Returns:
        (d_model,) float32.
    """
    fit = LinearFit(text.head.shape[1], text.head.device)
    head = exported_head(text.head, None)
    inputs, seen = [], []
    for x, following in text.batches():
        logits, read = x @ head.T, reads(x)
        some = ~read.all(1)
        fit.add(x[some], best_level(logits[some], ~read[some]), torch.ones_like(x[some, 0]))
        together = logits.masked_fill_(~read, -torch.inf).logsumexp(1)
        hit = read.gather(1, following[:, None])[:, 0]
        inputs.append(x)
        seen.append(torch.stack([together, (~read).sum(1).log(), hit.float()]))
    level, constant = fit.solve(_RIDGE)
    x = torch.cat(inputs)
    together, count, hit = torch.cat(seen, 1)
    odds = (together + x @ level - count).double()
    offset = _offset(odds, (x @ constant).double(), hit.double())
    return torch.add(level, constant, alpha=offset)


def _offset(odds: torch.Tensor, moved: torch.Tensor, hit: torch.Tensor) -> float:
    """Return how far to move the level so that text is most probable, and the move.

    Where few successors are left out the text says little; the move is then a small one.

    Args:
        odds: (rows,) float64, logarithm of the odds that the next token is read.
        moved: (rows,) float64, what the odds grow by if the level moves by 1.
        hit: (rows,) float64, 1 where the next token of the text is read, else 0.
    """
    low, high = -4.0, 4.0
    for _ in range(_STEPS):  # the loss is convex in the offset
        offset = (low + high) / 2
        slope = float((moved * (torch.sigmoid(odds + offset * moved) - hit)).sum())
        slope += offset / _SPREAD**2
        low, high = (low, offset) if slope > 0 else (offset, high)
    return (low + high) / 2


def measure(text: Text, reads: Reads, level: torch.Tensor) -> Changes:
    """Measure a predictor on held-out text.

    Args:
        text: rows that were held out.
        reads: which rows are read.
        level: see `fit_level`.

    Returns:
        What it changes.
    """
    head = exported_head(text.head, level)
    sums, growths = torch.zeros(6, dtype=torch.float64), []
    for x, following in text.batches():
        found, growth = _compare(x @ head.T, reads(x), following)
        sums += found
        growths.append(growth)
    n, growth = len(text.rows), torch.cat(growths).double().cpu()
    read, divergence, changed, hits, alone, losses = sums.tolist()
    return Changes(
        rows_read=read / n / len(head),
        ppl_levelled=math.exp(losses / n),
        ppl_predicted=math.exp(losses / n + float(growth.mean())),
        standard_error=float(growth.std() / n**0.5),
        kl_divergence=max(0.0, divergence / n),
        ppl_renormalised=math.exp(alone / max(hits, 1)),
        missed=1 - hits / n,
        changed=changed / n,
    )


def _compare(
    logits: torch.Tensor, read: torch.Tensor, following: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (6,) float64 sums over tokens on the CPU, and by how much each loss grows.

    The sums: rows read, divergence, changed tokens, successors read, their losses among rows read,
    losses with all rows.
    """
    best = logits.argmax(1)
    complete = logits.log_softmax(1)
    kept = logits.mul_(read)
    hit = read.gather(1, following[:, None])[:, 0]
    alone = kept.masked_fill(~read, -torch.inf).logsumexp(1)
    own = kept.gather(1, following[:, None])[:, 0]
    changed = kept.argmax(1) != best
    together = kept.logsumexp(1, keepdim=True)
    losses = (together - own[:, None])[:, 0]
    full = -complete.gather(1, following[:, None])[:, 0]
    divergence = (complete.exp() * complete.sub(kept).add_(together)).sum()
    sums = [read.sum(), divergence, changed.sum(), hit.sum(), (alone - own)[hit].sum(), full.sum()]
    return torch.stack([each.double().cpu() for each in sums]), losses - full


def always(chosen: torch.Tensor) -> Reads:
    """Return a rule that reads the same rows, (vocab_size,) bool, on every token."""
    return lambda x: chosen.expand(len(x), -1)


def by(predictor: HeadPredictor) -> Reads:
    """Return a predictor's rule, of its numbers as stored."""
    return predictor.stored().reads
