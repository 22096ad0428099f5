"""S2 and S3 on the CPU in float32: loops over rows, which Numba compiles when they first run.

Rows are taken four at a time. One row of a 7B model is four pages, and a core's prefetcher stops at
the end of each; four streams keep the memory busy meanwhile. Importing this module imports Numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from numba import config, get_num_threads, njit, prange, set_num_threads

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

PARTS = 16
"""Partial sums of S3, whatever the number of threads, so that this changes no bit."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _compiled(function: _Function, **options: Any) -> _Function:
    """Compile a function; to the type checker it stays what it is."""
    made: _Function = njit(**options)(function)
    return made


def _compiled_parallel(function: _Function) -> _Function:
    # What vectorises a sum, but not what supposes that no number is NaN or infinite.
    return _compiled(function, parallel=True, fastmath={"reassoc", "contract", "nsz"})


def use_threads(count: int) -> None:
    """Run the loops on `count` threads, or on as many as Numba has if these are fewer.

    The first call starts Numba's threads, which may change the number that PyTorch would use: both
    ask the same OpenMP library.
    """
    numba_config: Any = config
    wanted = min(count, numba_config.NUMBA_NUM_THREADS)
    if wanted != get_num_threads():
        set_num_threads(wanted)


@_compiled
def _computed_rows(scores: Floats, threshold: float, rows: Ints) -> int:
    """List the rows that some token computes, `s > 0` and `s >= threshold`; return their number."""
    count = 0
    for row in range(scores.shape[1]):
        for token in range(scores.shape[0]):
            if scores[token, row] > 0 and scores[token, row] >= threshold:
                rows[count] = row
                count += 1
                break
    return count


@_compiled
def _nonzero_rows(x1: Floats, rows: Ints) -> int:
    """List the rows where some token's `x1` is not 0; return their number."""
    count = 0
    for row in range(x1.shape[1]):
        for token in range(x1.shape[0]):
            if x1[token, row] != 0:
                rows[count] = row
                count += 1
                break
    return count


@_compiled
def _clear(matrix: Floats) -> None:
    """Set to 0, on this thread: inside `up` and `down` Numba would start all of them for `= 0`."""
    matrix[:] = 0


@_compiled_parallel
def up(scores: Floats, x: Floats, w1: Floats, threshold: float, x1: Floats) -> None:
    """S2 into `x1`; shapes as in `cpu.up`, all contiguous."""
    tokens, d_model = x.shape
    rows = np.empty(scores.shape[1], np.int32)
    count = _computed_rows(scores, threshold, rows)
    _clear(x1)
    for group in prange((count + 3) // 4):
        # The last group may take its last row several times, each time with the same result.
        first, last = 4 * group, count - 1
        a, b = rows[first], rows[min(first + 1, last)]
        c, d = rows[min(first + 2, last)], rows[min(first + 3, last)]
        for token in range(tokens):
            dot_a = dot_b = dot_c = dot_d = np.float32(0)
            for k in range(d_model):
                value = x[token, k]
                dot_a += w1[a, k] * value
                dot_b += w1[b, k] * value
                dot_c += w1[c, k] * value
                dot_d += w1[d, k] * value
            for row, dot in ((a, dot_a), (b, dot_b), (c, dot_c), (d, dot_d)):
                score = scores[token, row]
                if score > 0 and score >= threshold:
                    x1[token, row] = score * dot


@_compiled_parallel
def down(x1: Floats, w2t: Floats, y: Floats) -> None:
    """S3 into `y`; shapes as in `cpu.down`, all contiguous."""
    tokens, d_model = y.shape
    rows = np.empty(x1.shape[1], np.int32)
    count = _nonzero_rows(x1, rows)
    sums = np.empty((PARTS, tokens, d_model), np.float32)
    for part in prange(PARTS):
        _clear(sums[part])
        first, end = count * part // PARTS, count * (part + 1) // PARTS
        fours = first + (end - first) // 4 * 4
        for i in range(first, fours, 4):
            a, b, c, d = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
            for token in range(tokens):
                by_a, by_b, by_c, by_d = x1[token, a], x1[token, b], x1[token, c], x1[token, d]
                for k in range(d_model):
                    sums[part, token, k] += (
                        by_a * w2t[a, k] + by_b * w2t[b, k] + by_c * w2t[c, k] + by_d * w2t[d, k]
                    )
        for i in range(fours, end):
            row = rows[i]
            for token in range(tokens):
                by = x1[token, row]
                for k in range(d_model):
                    sums[part, token, k] += by * w2t[row, k]
    _clear(y)
    for part in range(PARTS):
        for token in range(tokens):
            for k in range(d_model):
                y[token, k] += sums[part, token, k]
