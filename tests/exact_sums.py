"""Sums that do not depend on their order: what a graph computes, apart from how a processor adds.

Two orders of a float32 sum differ in the last bit, and where a number that is then rounded to 8 or
16 bits lies between two steps, that bit decides which it becomes. So logits depend on a processor
and on how many tokens are computed at once, by whole steps. A float64 sum that is rounded once to
float32 is the same in every order but for one sum in about 2**28: here equal means equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_SUMS = {
    functional.linear,
    torch.Tensor.__matmul__,
    torch.Tensor.matmul,
    torch.Tensor.mean,
    torch.Tensor.softmax,
}


class ExactSums(TorchFunctionMode):
    """Within it, products of matrices, means and softmax of float32 are those of float64."""

    def __torch_function__(
        self,
        called: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if called not in _SUMS:
            return called(*args, **(kwargs or {}))
        wide = [part.double() if isinstance(part, torch.Tensor) else part for part in args]
        return called(*wide, **(kwargs or {})).float()
