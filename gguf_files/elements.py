"""Element types as files hold them: their sizes, and reading numbers of every type."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

PLAIN: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.I32: np.dtype("<i4"),
}
"""Types whose elements are numpy's."""


def data_size(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Return the bytes of a tensor's data; the last dimension is a whole number of blocks."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    size: int = math.prod(shape) // block * block_bytes
    return size


def decode(
    data: npt.NDArray[np.uint8], shape: tuple[int, ...], kind: GGMLQuantizationType
) -> npt.NDArray[np.generic]:
    """Return the numbers of a tensor's data, in their own type or float32 if quantised.

    Args:
        data: its bytes, (n,) uint8.
        shape: numpy order.
        kind: any type that gguf can dequantise.

    Raises:
        NotImplementedError: it is another.
    """
    if kind in PLAIN:
        return data.view(PLAIN[kind]).reshape(shape)
    with np.errstate(over="ignore", invalid="ignore"):  # damaged scales are NaN or too large
        numbers: npt.NDArray[np.generic] = quants.dequantize(data.reshape(*shape[:-1], -1), kind)
    return numbers


@cache
def readable(kind: GGMLQuantizationType) -> bool:
    """Whether `decode` knows a type: gguf dequantises most, some of ggml's it does not."""
    _, block_bytes = GGML_QUANT_SIZES[kind]
    try:
        decode(np.zeros(block_bytes, np.uint8), (1, GGML_QUANT_SIZES[kind][0]), kind)
    except NotImplementedError:
        return False
    return True
