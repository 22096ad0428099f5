"""S2 and S3 on the CPU: compiled loops for float32, PyTorch's embedding bags for the half types.

Functions and arguments are those of `operators`, which has checked them. The order of additions
does not depend on the number of threads, so every call is deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_operators import cpu_bags
from sparse_operators.reference import rounded_threshold


def up(
    scores: Tensor,
    x: Tensor,
    w1: Tensor,
    *,
    threshold: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """S2, `x1 (t, d_ff)`, exactly 0 where a neuron is skipped; see `operators.sparse_up`."""
    if w1.dtype != torch.float32:
        return cpu_bags.up(scores, x, w1, threshold=threshold)
    x1 = torch.empty(scores.shape)
    _loops().up(*map(_array, (scores, x, w1)), rounded_threshold(threshold, w1.dtype), _array(x1))
    return x1


def down(x1: Tensor, w2t: Tensor, *, deterministic: bool = False) -> Tensor:
    """S3, `y (t, d_model)`; see `operators.sparse_down`."""
    if w2t.dtype != torch.float32:
        return cpu_bags.down(x1, w2t)
    y = torch.empty(x1.shape[0], w2t.shape[1])
    _loops().down(_array(x1), _array(w2t), _array(y))
    return y


def up_down(
    scores: Tensor,
    x: Tensor,
    w1: Tensor,
    w2t: Tensor,
    *,
    threshold: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """S2, then S3; see `operators.sparse_up_down`."""
    return down(up(scores, x, w1, threshold=threshold), w2t)


def _loops() -> Any:
    """Return the compiled loops, set to PyTorch's number of threads."""
    from sparse_operators import cpu_loops

    threads = torch.get_num_threads()
    cpu_loops.use_threads(threads)
    if torch.get_num_threads() != threads:  # Numba's start changed it
        torch.set_num_threads(threads)
    return cpu_loops


def _array(tensor: Tensor) -> Any:
    """Return the tensor's memory as a NumPy array, rows in order."""
    return tensor.detach().contiguous().numpy()
