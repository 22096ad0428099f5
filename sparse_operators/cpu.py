"""S2 and S3 on the CPU: compiled loops for float32, PyTorch's embedding bags for the other types.

The loops (`cpu_loops`) are faster; without Numba, float32 takes the bags (`cpu_bags`), too.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
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
    """S2: `act(scores) ⊙ (x·w1ᵀ)`, reading only rows of `w1` that some token computes.

    Args:
        scores: `(t, d_ff)`.
        x: `(t, d_model)`.
        w1: `(d_ff, d_model)`, contiguous.
        threshold: 0 for ReLU, T for FATReLU.
        deterministic: The CPU always is.

    Returns:
        `x1 (t, d_ff)` in the inputs' type, exactly 0 where a neuron is skipped.
    """
    if not has_loops(w1.dtype):
        return cpu_bags.up(scores, x, w1, threshold=threshold)
    x1 = torch.empty(scores.shape)
    _loops().up(*map(_array, (scores, x, w1)), rounded_threshold(threshold, w1.dtype), _array(x1))
    return x1


def down(x1: Tensor, w2t: Tensor, *, deterministic: bool = False) -> Tensor:
    """S3: `x1·w2t`, reading only rows of `w2t` where some token's `x1` is not 0.

    The order of additions does not depend on the number of threads.

    Args:
        x1: `(t, d_ff)`.
        w2t: `(d_ff, d_model)`, contiguous.
        deterministic: The CPU always is.

    Returns:
        `y (t, d_model)` in the inputs' type.
    """
    if not has_loops(w2t.dtype):
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
    """S2, then S3; see `up` and `down`."""
    return down(up(scores, x, w1, threshold=threshold), w2t)


@cache
def has_loops(dtype: torch.dtype) -> bool:
    """Whether the compiled loops run a type."""
    return dtype == torch.float32 and find_spec("numba") is not None


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
