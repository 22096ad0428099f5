"""A tensor's numbers a piece at a time, for what looks at all of them once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy.typing as npt
from gguf import GGML_QUANT_SIZES

from common.errors import FormatError
from gguf_files.elements import PLAIN, decode
from gguf_files.reader import GGUFFile

_PIECE = 1 << 20


def pieces(
    file: GGUFFile, name: str, numbers: int = _PIECE
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield where in a tensor a piece begins, and its numbers, (n,), in the file's order.

    Args:
        file: the file.
        name: of a tensor of any shape.
        numbers: of a piece, about; a multiple of the type's block is kept exactly.

    Yields:
        F32, F16 and I32 as they are, mapped from the file; what is quantised as float32.

    Raises:
        FormatError: the tensor is missing, a vector that is not plain, or of a type that psp cannot
            read.
    """
    data = file.mapped(name)
    info = file.tensors[name]
    if len(info.shape) == 1 and info.kind not in PLAIN:
        raise file.error(f"tensor {name} is a vector of {info.kind.name}, expected F32")
    block, block_bytes = GGML_QUANT_SIZES[info.kind]
    step = max(1, numbers // block)
    for at in range(0, math.prod(info.shape) // block, step):
        part = data[at * block_bytes : (at + step) * block_bytes]
        try:
            found = decode(part, (1, len(part) // block_bytes * block), info.kind)
        except NotImplementedError as error:
            raise FormatError(
                f"{file.path}: tensor {name} has type {info.kind.name}, which cannot be read",
                "export with f16 or q4_0",
            ) from error
        yield at * block, found.reshape(-1)
