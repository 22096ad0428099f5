"""The gated FFN in plain PyTorch: what every faster path must equal.

Layouts, here and in the whole package: `t` tokens, `x (t, d_model)`, `scores (t, d_ff)` which are
`x·gateᵀ`, `w1 (d_ff, d_model)` which is `up_proj.weight`, `w2t (d_ff, d_model)` which is
`down_proj.weight` transposed and contiguous: one neuron is one contiguous row of both matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounded_threshold(threshold: float, dtype: torch.dtype) -> float:
    """The threshold as the scores' own type holds it, so that a score equal to it is a tie.

    0.02 is no float16; without rounding, the float16 score nearest to it would fall on either side
    of the comparison according to the precision that a kernel compares in.

    Args:
        threshold: 0 for ReLU, the shift T of FATReLU otherwise.
        dtype: Type of the scores.
    """
    # On the CPU whatever the default device: a CUDA scalar would wait for the card.
    return float(torch.tensor(threshold, dtype=dtype, device="cpu"))


def computes(scores: Tensor, threshold: float = 0.0) -> Tensor:
    """Which neurons are computed: `s > 0` for ReLU, `s >= T` for FATReLU.

    Args:
        scores: Gate pre-activations, any shape, floating.
        threshold: 0 for ReLU, the shift T of FATReLU otherwise (rounded to the scores' type).

    Returns:
        Boolean tensor of the scores' shape.

    Source: FATReLU as ProSparse (arXiv 2402.13516, activation threshold shift) defines it. The CUDA
    kernel published with it skips `s <= T` instead, so it differs on exact ties
    (Raincleared-Song/sparse_gpu_operator: kernel/formula_23_kernel.cu).
    """
    return (scores > 0) & (scores >= rounded_threshold(threshold, scores.dtype))


def up(scores: Tensor, x: Tensor, w1: Tensor, *, threshold: float = 0.0) -> Tensor:
    """S2: `act(scores) ⊙ (x·w1ᵀ)`, densely.

    Args:
        scores: `(t, d_ff)`.
        x: `(t, d_model)`.
        w1: `(d_ff, d_model)`.
        threshold: 0 for ReLU, T for FATReLU.

    Returns:
        `x1 (t, d_ff)` in the inputs' type.
    """
    gated = torch.where(computes(scores, threshold), scores, 0.0)
    return gated * (x @ w1.T)


def down(x1: Tensor, w2t: Tensor) -> Tensor:
    """S3: `x1·w2t`, densely.

    Args:
        x1: `(t, d_ff)`.
        w2t: `(d_ff, d_model)`.

    Returns:
        `y (t, d_model)` in the inputs' type.
    """
    return x1 @ w2t
