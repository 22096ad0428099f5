"""The operators as PyTorch sees them: `psp::sparse_up`, `psp::sparse_down`, `psp::sparse_up_down`.

Custom ops with fake kernels, so `torch.compile` keeps them whole and CUDA graphs may hold them. On
CUDA they run the Triton kernels, elsewhere the CPU path. They are for inference: no gradients.

The first call for a shape compiles its kernels: make one before capturing a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_operators.checks import check_down, check_no_nan, check_up, check_up_down


def sparse_up(
    scores: Tensor,
    x: Tensor,
    w1: Tensor,
    *,
    threshold: float = 0.0,
    deterministic: bool = False,
    check: bool = True,
) -> Tensor:
    """S2: `act(scores) ⊙ (x·w1ᵀ)`, reading only the rows of `w1` that some token activates.

    Args:
        scores: Gate pre-activations `(t, d_ff)`, t = 1 to 8; float16, bfloat16 or float32.
        x: FFN input `(t, d_model)`, same type and device.
        w1: `up_proj.weight (d_ff, d_model)`, contiguous, same type and device.
        threshold: 0 for ReLU (`s > 0` computes), T for FATReLU (`s >= T` computes).
        deterministic: As in `sparse_down`.
        check: Also look for NaN, which on CUDA waits for the device. Never done while compiling
            or capturing; shapes, types, devices and layouts are checked always.

    Returns:
        `x1 (t, d_ff)`, 0 where a token does not activate a neuron.

    Raises:
        ValueError: An argument is not as described; nothing was launched.
    """
    if check:
        check_no_nan("scores", scores)
    operator = torch.ops.psp.sparse_up
    return operator(scores, x, w1, threshold, deterministic)  # type: ignore[no-any-return]


def sparse_down(
    x1: Tensor, w2t: Tensor, *, deterministic: bool = False, check: bool = True
) -> Tensor:
    """S3: `x1·w2t`, reading only the rows of `w2t` where some token's `x1` is not 0.

    Args:
        x1: `(t, d_ff)`, t = 1 to 8; float16, bfloat16 or float32.
        w2t: `down_proj.weight` transposed, `(d_ff, d_model)`, contiguous, same type and device.
        deterministic: The same bits in every process on the same card, even where tuning (`psp
            bench-operators --tune`) has changed how it cuts sums up. Within a process they repeat
            in any case.
        check: Also look for NaN, as in `sparse_up`.

    Returns:
        `y (t, d_model)`.

    Raises:
        ValueError: An argument is not as described; nothing was launched.
    """
    if check:
        check_no_nan("x1", x1)
    return torch.ops.psp.sparse_down(x1, w2t, deterministic)  # type: ignore[no-any-return]


def sparse_up_down(
    scores: Tensor,
    x: Tensor,
    w1: Tensor,
    w2t: Tensor,
    *,
    threshold: float = 0.0,
    deterministic: bool = False,
    check: bool = True,
) -> Tensor:
    """S2 then S3 in one operator, which may keep `x1` out of memory.

    Arguments and result are those of `sparse_up` and `sparse_down`.

    Raises:
        ValueError: An argument is not as described; nothing was launched.
    """
    if check:
        check_no_nan("scores", scores)
    operator = torch.ops.psp.sparse_up_down
    return operator(scores, x, w1, w2t, threshold, deterministic)  # type: ignore[no-any-return]


@torch.library.custom_op(
    "psp::sparse_up",
    mutates_args=(),
    schema="(Tensor scores, Tensor x, Tensor w1, float threshold, bool deterministic) -> Tensor",
)
def _up(scores: Tensor, x: Tensor, w1: Tensor, threshold: float, deterministic: bool) -> Tensor:
    check_up(scores, x, w1, threshold)
    arguments = scores.contiguous(), x.contiguous(), w1
    y: Tensor = _kernels(w1).up(*arguments, threshold=threshold, deterministic=deterministic)
    return y


@_up.register_fake
def _up_fake(
    scores: Tensor, x: Tensor, w1: Tensor, threshold: float, deterministic: bool
) -> Tensor:
    check_up(scores, x, w1, threshold)
    return scores.new_empty(scores.shape)


@torch.library.custom_op(
    "psp::sparse_down",
    mutates_args=(),
    schema="(Tensor x1, Tensor w2t, bool deterministic) -> Tensor",
)
def _down(x1: Tensor, w2t: Tensor, deterministic: bool) -> Tensor:
    check_down(x1, w2t)
    y: Tensor = _kernels(w2t).down(x1.contiguous(), w2t, deterministic=deterministic)
    return y


@_down.register_fake
def _down_fake(x1: Tensor, w2t: Tensor, deterministic: bool) -> Tensor:
    check_down(x1, w2t)
    return x1.new_empty(x1.shape[0], w2t.shape[1])


@torch.library.custom_op(
    "psp::sparse_up_down",
    mutates_args=(),
    schema="(Tensor scores, Tensor x, Tensor w1, Tensor w2t, float threshold, bool deterministic)"
    " -> Tensor",
)
def _up_down(
    scores: Tensor, x: Tensor, w1: Tensor, w2t: Tensor, threshold: float, deterministic: bool
) -> Tensor:
    check_up_down(scores, x, w1, w2t, threshold)
    arguments = scores.contiguous(), x.contiguous(), w1, w2t
    y: Tensor = _kernels(w1).up_down(*arguments, threshold=threshold, deterministic=deterministic)
    return y


@_up_down.register_fake
def _up_down_fake(
    scores: Tensor, x: Tensor, w1: Tensor, w2t: Tensor, threshold: float, deterministic: bool
) -> Tensor:
    check_up_down(scores, x, w1, w2t, threshold)
    return x.new_empty(x.shape)


def _kernels(weight: Tensor) -> Any:
    """The module whose `up`, `down` and `up_down` run where the weight is."""
    if weight.is_cuda:
        from sparse_operators import cuda

        return cuda
    from sparse_operators import cpu

    return cpu
