"""What it is worth to read a row of the head, and where the rows that are left out should lie.

A row that is left out has logit 0. With z its logit and Z the sum of all exponentials, the
divergence from the complete distribution that it adds by that is, others being as they are,

    p · (z - 0) - (exp(z) - 1) / Z = (1 + (z - 1) · exp(z)) / Z

which is never negative and 0 only where z is 0. A row is worth reading if that exceeds a price. A
vector that is added to all rows of the head moves all logits of a token together, which changes no
probability, but what 0 stands for: the level.
"""

from __future__ import annotations

import torch

_ROUNDS = 2
_LEAST = 1e-9


def worth(logits: torch.Tensor) -> torch.Tensor:
    """Return what reading each row is worth, nats of divergence.

    Args:
        logits: (rows, vocab_size) float32.

    Returns:
        (rows, vocab_size) float32.
    """
    normaliser = logits.logsumexp(1, keepdim=True)
    return (logits - normaliser).exp_().mul_(logits - 1).add_((-normaliser).exp_())


def best_level(logits: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
    """Return by how much each token's logits should be raised, (rows,) float32.

    Then rows that are left out have, at 0, the probability that they have together.

    Args:
        logits: (rows, vocab_size) float32.
        left_out: the same shape, bool; somewhere true in every row.
    """
    together = logits.masked_fill(~left_out, -torch.inf).logsumexp(1)
    return left_out.sum(1).log() - together


def levelled(logits: torch.Tensor, price: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Settle each token's level and the rows that are worth reading at it.

    Args:
        logits: (rows, vocab_size) float32.
        price: of a row, nats.

    Returns:
        (rows,) float32, the level, and (rows,) float32, the least logit that is read at it.
    """
    level = 2 - logits.mean(1)
    for _ in range(_ROUNDS):
        read = worth(logits + level[:, None]) > price
        read.scatter_(1, logits.argmax(1, keepdim=True), True)
        full = read.all(1)
        read[full, logits[full].argmin(1)] = False
        level = best_level(logits, ~read)
    least = logits.masked_fill(~read, torch.inf).amin(1) + level
    return level, least


class LinearFit:
    """Least squares of numbers on inputs, without a constant, gathered batch by batch."""

    def __init__(self, d_model: int, device: torch.device) -> None:
        """Begin with nothing."""
        self._products = torch.zeros(d_model, d_model, dtype=torch.float64, device=device)
        self._targets: torch.Tensor | None = None

    def add(self, x: torch.Tensor, *targets: torch.Tensor) -> None:
        """Count a batch: (rows, d_model) inputs, and (rows,) numbers to fit each."""
        self._products += (x.T @ x).double()
        found = (x.T @ torch.stack(targets, 1)).double()
        self._targets = found if self._targets is None else self._targets + found

    def solve(self, ridge: float) -> torch.Tensor:
        """Return (targets, d_model) float32, a vector for each.

        Args:
            ridge: damping in mean second moments of the inputs.
        """
        assert self._targets is not None
        damping = (ridge * self._products.diagonal().mean()).clamp_min(_LEAST)
        ones = torch.eye(len(self._products), device=self._products.device)
        damped = self._products + damping * ones
        found: torch.Tensor = torch.linalg.solve(damped, self._targets).T.float()
        return found
