"""What the operators refuse, before anything is launched.

A kernel reads wherever its arithmetic points, so a wrong shape would be a wild read on the GPU.
Every message is one line: the tensor, what it is, what was expected, the remedy. They are
`ValueError`s because this is a library interface; the command line never meets them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_operators.reference import rounded_threshold
from sparse_operators.settings import MAX_TOKENS

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_up(scores: Tensor, x: Tensor, w1: Tensor, threshold: float) -> None:
    """Refuse what S2 cannot compute; `operators.sparse_up` says what it can.

    Raises:
        ValueError: A shape, type, device, layout or threshold is wrong.
    """
    d_ff, d_model = _weight("w1", w1)
    _alike(("w1", w1), ("scores", scores), ("x", x))
    _tokens("scores", scores)
    _shape("scores", scores, (scores.shape[0], d_ff), "(tokens, d_ff) with w1's d_ff")
    _shape("x", x, (scores.shape[0], d_model), "(scores' tokens, w1's d_model)")
    check_threshold(threshold, scores.dtype)


def check_down(x1: Tensor, w2t: Tensor) -> None:
    """Refuse what S3 cannot compute; `operators.sparse_down` says what it can.

    Raises:
        ValueError: A shape, type, device or layout is wrong.
    """
    d_ff, _ = _weight("w2t", w2t)
    _alike(("w2t", w2t), ("x1", x1))
    _tokens("x1", x1)
    _shape("x1", x1, (x1.shape[0], d_ff), "(tokens, d_ff) with w2t's d_ff")


def check_up_down(scores: Tensor, x: Tensor, w1: Tensor, w2t: Tensor, threshold: float) -> None:
    """Refuse what S2 followed by S3 cannot compute.

    Raises:
        ValueError: A shape, type, device, layout or threshold is wrong.
    """
    check_up(scores, x, w1, threshold)
    _weight("w2t", w2t)
    _alike(("w1", w1), ("w2t", w2t))
    _shape("w2t", w2t, (w1.shape[0], w1.shape[1]), "w1's shape: pass down_proj.weight transposed")


def check_threshold(threshold: float, dtype: torch.dtype) -> None:
    """Refuse a threshold that is not a finite number of at least 0 in the scores' type.

    Raises:
        ValueError: It is negative, not finite, or too large for `dtype`.
    """
    if not math.isfinite(threshold) or threshold < 0:
        raise ValueError(
            f"threshold is {threshold}: expected a finite number, 0 for ReLU or T > 0 for FATReLU"
        )
    if not math.isfinite(rounded_threshold(threshold, dtype)):
        raise ValueError(f"threshold is {threshold}: too large for {dtype}, choose a smaller one")


def check_no_nan(name: str, values: Tensor) -> None:
    """Refuse NaN, which no threshold can place, unless values are only traced or captured.

    On CUDA this waits for the device; pass `check=False` to an operator to spare that.

    Raises:
        ValueError: There is a NaN.
    """
    if torch.compiler.is_compiling():
        return
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    bad = values.isnan()
    if bool(bad.any()):
        raise ValueError(
            f"{name} holds {int(bad.sum())} NaN among {values.numel()} values: expected none, "
            "look for an overflow in an earlier layer"
        )


def _weight(name: str, weight: Tensor) -> tuple[int, int]:
    """A contiguous floating matrix with rows and columns."""
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}: expected (d_ff, d_model), neither of them 0"
        )
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"{name} is {weight.dtype}: expected float16, bfloat16 or float32, "
            "convert it with .to()"
        )
    if not weight.is_contiguous():
        raise ValueError(
            f"{name} is not contiguous (strides {weight.stride()}): expected one neuron a row, "
            "store it once with .contiguous()"
        )
    return weight.shape[0], weight.shape[1]


def _alike(model: tuple[str, Tensor], *others: tuple[str, Tensor]) -> None:
    """The same type and device as the weight."""
    name, weight = model
    for other_name, other in others:
        if other.dtype != weight.dtype:
            raise ValueError(
                f"{other_name} is {other.dtype} and {name} is {weight.dtype}: expected one type, "
                "convert one of them with .to()"
            )
        if other.device != weight.device:
            raise ValueError(
                f"{other_name} is on {other.device} and {name} on {weight.device}: expected one "
                "device, move one of them with .to()"
            )


def _tokens(name: str, rows: Tensor) -> None:
    """A matrix of 1 to `MAX_TOKENS` rows."""
    if rows.ndim != 2:
        raise ValueError(
            f"{name} has shape {tuple(rows.shape)}: expected (tokens, d_ff), reshape a single "
            "token to (1, d_ff)"
        )
    if not 1 <= rows.shape[0] <= MAX_TOKENS:
        raise ValueError(
            f"{name} has {rows.shape[0]} tokens: expected 1 to {MAX_TOKENS}, use the dense "
            "product for longer batches"
        )


def _shape(name: str, value: Tensor, expected: tuple[int, int], meaning: str) -> None:
    """Exactly this shape."""
    if tuple(value.shape) != expected:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: expected {expected}, that is {meaning}"
        )
