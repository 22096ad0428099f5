"""AdamW without torch's optimiser classes, whose constructor alone imports the compiler.

`torch.optim.Optimizer` decorates its methods so that `torch.compile` leaves them alone, and the
first call of one imports `torch._dynamo` and sympy: 1.4 s of a process. The function that those
classes call does the same arithmetic and imports nothing.
Source: torch@2.13.0 `optim/adam.py:Adam.step`, `optim/optimizer.py:_disable_dynamo_if_unsupported`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw

_EPS = 1e-8


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), for parameters with rates."""

    def __init__(
        self,
        rates: Sequence[tuple[torch.Tensor, float]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fused: bool = False,
    ) -> None:
        """Begin with moments of zero.

        Args:
            rates: float32 parameters, changed in place, each with its peak learning rate.
            betas: decay of the first and of the second moment.
            weight_decay: times the rate, what a parameter loses in a step; without it this is Adam.
            fused: take a step in one kernel, which rounds differently.
        """
        self._parameters = [_Parameter(tensor, rate, fused) for tensor, rate in rates]
        self._betas, self._weight_decay, self._fused = betas, weight_decay, fused

    @torch.no_grad()
    def step(self, share: float = 1.0) -> None:
        """Change all parameters by their `grad`, which stays.

        Args:
            share: of the peak rates.
        """
        for each in self._parameters:
            gradient = each.tensor.grad
            assert gradient is not None
            adamw(
                [each.tensor],
                [gradient],
                [each.first],
                [each.second],
                [],
                [each.steps],
                fused=self._fused or None,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=each.rate * share,
                weight_decay=self._weight_decay,
                eps=_EPS,
                maximize=False,
            )


class _Parameter:
    """A parameter, its peak rate and its moments."""

    def __init__(self, tensor: torch.Tensor, rate: float, fused: bool) -> None:
        self.tensor, self.rate = tensor, rate
        self.first, self.second = torch.zeros_like(tensor), torch.zeros_like(tensor)
        # The fused kernel counts where it runs; the others on the CPU, which launches nothing.
        self.steps = torch.zeros((), device=tensor.device if fused else "cpu")


def cosine(step: int, steps: int) -> float:
    """Return the share of the peak rate in a step of so many, from 1 down to nearly 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))
