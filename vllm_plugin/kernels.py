"""The sparse operators as the plugin runs them.

On the CPU PyTorch's embedding bags serve every type. Numba's loops, which are faster in float32, do
not go together with vLLM: they start threads of their own beside those that vLLM has bound to
cores, and with Numba in the process vLLM 0.32.0 can start no further engine there.
"""

from __future__ import annotations

from torch import Tensor

from sparse_operators import cpu_bags
from sparse_operators.operators import sparse_down, sparse_up, sparse_up_down


def up(scores: Tensor, x: Tensor, w1: Tensor, *, threshold: float) -> Tensor:
    """S2, `x1 (t, d_ff)`; see `sparse_operators.operators.sparse_up`."""
    if w1.is_cuda:
        return sparse_up(scores, x, w1, threshold=threshold, check=False)
    return cpu_bags.up(scores.contiguous(), x.contiguous(), w1, threshold=threshold)


def down(x1: Tensor, w2t: Tensor) -> Tensor:
    """S3, `y (t, d_model)`; see `sparse_operators.operators.sparse_down`."""
    return sparse_down(x1, w2t, check=False) if w2t.is_cuda else cpu_bags.down(x1, w2t)


def up_down(scores: Tensor, x: Tensor, w1: Tensor, w2t: Tensor, *, threshold: float) -> Tensor:
    """S2, then S3; see `sparse_operators.operators.sparse_up_down`."""
    if w1.is_cuda:
        return sparse_up_down(scores, x, w1, w2t, threshold=threshold, check=False)
    return down(up(scores, x, w1, threshold=threshold), w2t)
