"""Files of `torch.save` from elsewhere, read without running anything that they hold."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, TypeGuard

import torch

from common.errors import PredictorError, reason

_FETCH = "fetch the predictors again"
_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


def read_tensor_file(file: Path) -> Any:
    """Read a `.pt` file without running anything that it holds.

    Raises:
        PredictorError: damaged, or it holds more than tensors.
    """
    try:
        zipped = zipfile.is_zipfile(file)
        if zipped and any(part.compress_size < part.file_size for part in _parts(file)):
            raise PredictorError(f"{file}: is compressed, as torch.save writes none", _FETCH)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except PredictorError:
        raise
    except Exception as error:
        # The reader raises many kinds: not a zip, an early end, a forbidden pickle.
        raise PredictorError(f"{file}: cannot be read ({reason(error)})", _FETCH) from error


def _parts(file: Path) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(file) as archive:
        return archive.infolist()


def is_plain(value: object) -> TypeGuard[torch.Tensor]:
    """Whether a value is a tensor whose numbers are all there.

    A file may hold others: without data, sparse, quantised, or a few bytes seen as terabytes by
    way of strides of zero.
    """
    return (
        isinstance(value, torch.Tensor)
        and value.device.type == "cpu"
        and value.layout is torch.strided
        and value.dtype in _DTYPES
        and value.nbytes <= value.untyped_storage().nbytes()
    )
