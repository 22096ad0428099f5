"""Whether a tensor in a file holds the numbers of its model, looked at piece by piece."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType

from gguf_export.pwri.element_types import WIDE, WRITABLE, encode
from gguf_export.pwri.schema import HEAD
from gguf_files.elements import decode
from gguf_files.names import PROFILER
from gguf_files.pieces import pieces
from gguf_files.reader import GGUFFile

_FOREIGN_ERRORS = {"2": 0.5, "3": 0.25, "4": 0.15, "5": 0.08, "6": 0.03, "8": 0.03}
"""Largest relative error of a matrix in a type that psp does not write, by its bits: at least 1.3
times what PowerInfer's `quantize` makes of the testbed's."""

_BLOCK, _NEAR = 32, 1.25
"""Of Q4_0: numbers that are rounded together, and by how many steps one may be off: by half a step,
by a whole one at the end that 4 bits lack, and by what a mean over rows does not tell."""

_PIECE = 1 << 20

Numbers = npt.NDArray[Any]


def same_numbers(file: GGUFFile, name: str, expected: torch.Tensor) -> bool:
    """Tell whether a tensor's numbers are the model's, or these rounded to the file's type.

    A head with a predictor has a level too.

    Args:
        file: the file.
        name: of a tensor with at least as many numbers; those beyond are not looked at.
        expected: the model's, contiguous and laid out as in the file.

    Raises:
        FormatError: the tensor is missing or cannot be read.
    """
    if name == HEAD and PROFILER in file.tensors:
        return _same_head(file, expected)
    if name not in file.tensors:
        raise file.error(f"tensor {name} is missing")
    numbers, kind = expected.reshape(-1), file.tensors[name].kind
    error, size, compared = 0.0, 0.0, 0
    for start, held in pieces(file, name, _PIECE):
        piece = numbers[start : start + len(held)]
        found, compared = held[: len(piece)], compared + len(piece)
        if kind not in WRITABLE:
            plain = piece.float().numpy()
            error += float(np.linalg.norm(found - plain)) ** 2
            size += float(np.linalg.norm(plain)) ** 2
        elif not _rounded_to(piece, found, kind, wide=expected.dim() == 1 or kind in WIDE):
            return False
    largest = _FOREIGN_ERRORS.get(kind.name[1], 0.0)
    return compared == len(numbers) and math.sqrt(error) <= largest * math.sqrt(size)


def zeros_after(file: GGUFFile, name: str, count: int) -> bool:
    """Whether a tensor holds nothing but zeros after so many numbers."""
    if math.prod(file.tensors[name].shape) == count:
        return True
    return not any(
        found[max(0, count - start) :].any() for start, found in pieces(file, name, _PIECE)
    )


def _rounded_to(
    expected: torch.Tensor, found: Numbers, kind: GGMLQuantizationType, *, wide: bool
) -> bool:
    """Whether numbers are the expected ones, or these as psp writes them in a type."""
    plain = expected.float() if expected.dtype == torch.bfloat16 else expected
    if np.array_equal(found, plain.numpy()):
        return True
    rounded = expected.float() if wide else expected.half()
    data = encode(rounded.numpy(), kind).reshape(-1).view(np.uint8)
    return np.array_equal(found, decode(data, tuple(expected.shape), kind))


def _same_head(file: GGUFFile, expected: torch.Tensor) -> bool:
    """Compare a head in Q4_0 to whose rows a predictor added a level of their own."""
    width = expected.shape[1]
    rows = max(1, _PIECE // width) * width
    numbers, level = expected.reshape(-1, width), torch.zeros(width)
    for start, found in pieces(file, HEAD, rows):
        held = torch.from_numpy(found).reshape(-1, width)
        level += excess(numbers[start // width :][: len(held)], held)
    level /= len(numbers)
    for start, found in pieces(file, HEAD, rows):
        held = torch.from_numpy(found).reshape(-1, width)
        if not near(numbers[start // width :][: len(held)] + level, held):
            return False
    return True


def excess(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return by how much rows are more than expected, their sum, (d_model,) float32."""
    return (found.float() - expected.float()).sum(0)


def near(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether Q4_0 numbers are those of which `expected` is known but for a little."""
    blocks = found.float().reshape(-1, _BLOCK)
    steps = blocks.abs().amax(1, keepdim=True) / 8
    apart = (blocks - expected.float().reshape(-1, _BLOCK)).abs()
    return bool((apart <= _NEAR * steps).all())
