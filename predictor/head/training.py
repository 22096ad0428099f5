"""Training of a head's predictor at a price of a row.

What a decision costs is known exactly: a row that is read costs the price, one that is left out
what it is worth (`price.worth`). So each row of each token weighs by the difference, and its label
is the difference's sign. Weights are rounded to Q4_0 in every step, as the engine will read them;
gradients pass through.

A number that crosses a step of Q4_0 moves as far at the smallest rate as at the largest, and one
of fc1 that meets the inputs' mean moves every row's score at once. Where that happens late, the
last state is worse than the first; so several states are judged, and the best is the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import logsigmoid

from common.rounding import through_q4_0, to_q8_0
from predictor.head.measure import Text
from predictor.head.output_head import batch_rows
from predictor.head.price import worth
from predictor.head.rule import HeadPredictor
from predictor.head.start import Moments, Wanted
from predictor.optimiser import AdamW, cosine

_RATES = (3e-3, 2e-2)
"""Peak rates of Adam: of fc1 in whitened inputs, whose start has rows of norm 1, and of fc2."""

_BATCH = 256
_BETAS = (0.9, 0.99)
_SURE = 100.0
"""What the most probable row and the one that the text goes on with are worth besides, in prices:
greedy text hangs on the first, and of the second the model's own probabilities tell too little."""

_JUDGED_ROWS = 1024
_JUDGED_STATES = (0.625, 0.75, 0.875, 1.0)
"""After which shares of the steps."""

OnStep = Callable[[float], None]


class HeadTrainer:
    """Trains predictors on the same rows."""

    def __init__(self, text: Text, moments: Moments, seed: int) -> None:
        """Name what to train on.

        Args:
            text: the rows.
            moments: of their inputs.
            seed: of their order.
        """
        self._text, self._moments = text, moments
        self._generator = torch.Generator().manual_seed(seed)
        self._batch = min(_BATCH, batch_rows(len(text.head)))

    def steps(self, epochs: float) -> int:
        """Return the steps of so many passes over the rows."""
        return max(1, round(epochs * len(self._text.rows) / self._batch))

    def train(
        self,
        predictor: HeadPredictor,
        wanted: Wanted,
        epochs: float,
        rate: float = 1.0,
        on_step: OnStep = lambda loss: None,
    ) -> HeadPredictor:
        """Return a predictor trained from another one, which is returned if nothing was better.

        Args:
            predictor: where to begin.
            wanted: price and level.
            epochs: passes over the rows.
            rate: factor of the peak learning rates.
            on_step: takes every step's loss, prices a row.
        """
        head = self._text.head.float() + wanted.level
        fc1 = (predictor.fc1 @ self._moments.root).requires_grad_()
        fc2 = predictor.fc2.clone().requires_grad_()
        rates = [(p, rate * r) for p, r in zip((fc1, fc2), _RATES, strict=True)]
        optimiser, steps = AdamW(rates, betas=_BETAS), self.steps(epochs)
        best = _Best(predictor, partial(self._judged, head, wanted.price))
        judged = {round(share * steps) for share in _JUDGED_STATES}
        for step, chosen in enumerate(self._order(steps), 1):
            x, weights = self._weighed(chosen, head, wanted.price)
            units = x @ through_q4_0(fc1 @ self._moments.inverse).T
            scores = units @ through_q4_0(fc2).T
            loss, gradient = _loss(scores.detach(), weights)
            fc1.grad = fc2.grad = None
            torch.autograd.backward(scores, gradient)
            optimiser.step(cosine(step - 1, steps))
            on_step(loss)
            if step in judged:
                best.offer((fc1 @ self._moments.inverse).detach(), fc2.detach())
        return best.predictor

    def _weighed(
        self, chosen: torch.Tensor, head: torch.Tensor, price: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs in Q8_0, (n, d_model), and what reading each row gains, (n, vocab_size)."""
        x = to_q8_0(self._text.rows.inputs[chosen].to(head.device).float())
        following = self._text.rows.following[chosen].to(head.device)
        return x, weights_of(x @ head.T, price, following)

    def _judged(self, head: torch.Tensor, price: float, predictor: HeadPredictor) -> float:
        """Return what a predictor's decisions, as the engine makes them, gain on some rows."""
        stored, gained = predictor.stored(), 0.0
        every = max(1, len(self._text.rows) // _JUDGED_ROWS)
        for chosen in torch.split(torch.arange(0, len(self._text.rows), every), self._batch):
            x, weights = self._weighed(chosen, head, price)
            gained += float(weights.masked_fill_(~stored.reads(x), 0).double().sum())
        return gained

    def _order(self, steps: int) -> list[torch.Tensor]:
        """Return the rows of each step, every row as often as every other."""
        batch, rows = self._batch, len(self._text.rows)
        passes = -(-steps * batch // rows)
        orders = [torch.randperm(rows, generator=self._generator) for _ in range(passes)]
        return list(torch.split(torch.cat(orders)[: steps * batch], batch))


class _Best:
    """Keeps the predictor whose decisions gain most."""

    def __init__(self, predictor: HeadPredictor, judged: Callable[[HeadPredictor], float]) -> None:
        self.predictor = predictor
        self._judged = judged
        self._gained = judged(predictor)

    def offer(self, fc1: torch.Tensor, fc2: torch.Tensor) -> None:
        """Keep a copy if it is better than all before; `fc2` may change afterwards."""
        gained = self._judged(HeadPredictor(fc1, fc2))
        if gained > self._gained:
            self._gained = gained
            self.predictor = HeadPredictor(fc1, fc2.clone())


def weights_of(
    logits: torch.Tensor, price: float, following: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what reading each row gains, in prices; negative where it does not pay.

    Args:
        logits: (rows, vocab_size) float32, the level in them.
        price: of a row, nats.
        following: (rows,) int64, the text's next tokens; None of text that is not known yet.
    """
    gains = worth(logits).div_(price).sub_(1)
    sure = [logits.argmax(1)] if following is None else [logits.argmax(1), following]
    for row in sure:
        gains[torch.arange(len(gains), device=gains.device), row] += _SURE
    return gains


def _loss(scores: torch.Tensor, weights: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return the mean logistic loss of a decision, and its gradient by the scores.

    Args:
        scores: (rows, vocab_size) float32.
        weights: the same shape; the sign is the label, the size the weight.
    """
    signs = weights.sign()
    margins = scores.mul_(signs)
    loss = -float((logsigmoid(margins) * weights.abs()).mean())
    gradient = torch.sigmoid(margins.neg_()).mul_(weights).mul_(-1 / weights.numel())
    return loss, gradient
