"""Caches and memory: what a benchmark must exceed, and what no operator can."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_CACHE = 64 << 20
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def cache_bytes(device: torch.device) -> int:
    """Return the size of the largest cache before the device's memory.

    That is the L2 of a GPU, the last level of a CPU as Linux tells it, else 64 MiB.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_bytes_of(file.read_text()) for file in _CPU_CACHES.glob("index*/size")]
    return max(sizes, default=_UNKNOWN_CACHE)


def _bytes_of(size: str) -> int:
    """Return the bytes that sysfs's `2048K` stands for."""
    number, unit = size.strip()[:-1], size.strip()[-1:]
    return int(number) * _UNITS[unit] if unit in _UNITS else int(size)


def stream(matrix: Tensor) -> Tensor:
    """Read a matrix once, in order, with nothing to compute worth mentioning.

    Half types are read as if they were float32, whose sum costs the CPU less.
    """
    pairs = matrix.dtype.itemsize == 2 and matrix.shape[-1] % 2 == 0
    return (matrix.view(torch.float32) if pairs else matrix).sum()


def bound_seconds(rows: float, d_model: int, dtype: torch.dtype, bandwidth: float) -> float:
    """Return the least time in which an operator can read its active rows.

    Args:
        rows: active neurons.
        d_model: elements of a row.
        dtype: of an element.
        bandwidth: bytes per second of a streaming read, as measured.
    """
    return rows * d_model * dtype.itemsize / bandwidth
