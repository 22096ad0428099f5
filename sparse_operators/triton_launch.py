"""How the kernels are cut up: programs, rows at a time, columns, warps.

Chosen from the shape and the card alone, never from the data, so that nothing waits for the device
and a CUDA graph may hold the launch. `triton_tuning` can replace a choice by a measured one;
without it the same card gives the same bits in every process, which automatic tuning could not
promise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

Operator = Literal["up", "down", "up_down"]

TENSOR_CORE_ROWS = 16
"""Least extent of a `tl.dot` operand: tokens are padded to it, and rows come in such groups."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One way to cut up an operator.

    Attributes:
        programs: Programs that share out the rows.
        group: Rows read at a time by one program.
        columns: Columns at a time (`up` and `up_down` of one token take whole rows: 0).
        warps: Warps of a program.
        stages: Depth of the software pipeline over groups; 1 is none.
    """

    programs: int
    group: int
    columns: int
    warps: int
    stages: int = 1


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a launch may depend on.

    Attributes:
        operator: S2, S3, or both fused.
        tokens: 1 to 8.
        d_model: Columns.
        d_ff: Rows.
        dtype: Type of every tensor.
        device: Where they are.
    """

    operator: Operator
    tokens: int
    d_model: int
    d_ff: int
    dtype: torch.dtype
    device: torch.device


tuned: dict[Problem, Launch] = {}
"""Measured choices, filled by `triton_tuning.tune` only."""


def launch_for(problem: Problem, *, deterministic: bool = False) -> Launch:
    """The measured choice if there is one, else the default.

    Args:
        problem: Operator, shape, type and device.
        deterministic: Always the default, so that tuning cannot change the order of sums.
    """
    if not deterministic and problem in tuned:
        return tuned[problem]
    return default_launch(problem)


@functools.cache
def default_launch(problem: Problem) -> Launch:
    """A few programs on every multiprocessor at once, each with tens of kilobytes in flight.

    By Little's law an H100 (3.35 TB/s, about 0.7 µs latency) needs 18 KB in flight on each
    multiprocessor; three programs of 8 warps with 4 rows of 4096 float16 hold 96 KB.
    """
    processors = _processors(problem.device)
    single = problem.tokens == 1
    columns = max(TENSOR_CORE_ROWS, min(256 if single else 128, power_of_two(problem.d_model)))
    if problem.operator == "down":
        splits = max(1, 4 * processors // -(-problem.d_model // columns))
        programs = min(splits, -(-problem.d_ff // TENSOR_CORE_ROWS))
        return Launch(programs=programs, group=32, columns=columns, warps=4)
    if problem.operator == "up_down":
        programs = min(2 * processors, problem.d_ff)
        group, warps = whole_rows(problem, 16 * 1024)
        return Launch(programs=programs, group=group, columns=0, warps=warps)
    programs = min(3 * processors, problem.d_ff)
    if single:
        group, warps = whole_rows(problem, 32 * 1024)
        return Launch(programs=programs, group=group, columns=0, warps=warps)
    return Launch(programs=programs, group=TENSOR_CORE_ROWS, columns=columns, warps=4, stages=4)


def whole_rows(problem: Problem, budget: int) -> tuple[int, int]:
    """Group and warps for programs that read whole rows into registers.

    Args:
        problem: Gives the length and type of a row.
        budget: Bytes of weights that a program may hold in registers at a time.

    Returns:
        Rows of a group, 1 to 16, and warps, 1 to 8: 64 elements of weights a thread at most.
    """
    columns = power_of_two(problem.d_model)
    group = min(16, max(1, budget // (columns * problem.dtype.itemsize)))
    return group, min(8, max(1, group * columns // 2048))


def rows_each(d_ff: int, programs: int, interleave: int = 1) -> int:
    """Rows that one program looks at: a power of two, runs of `interleave` included."""
    runs = -(-d_ff // interleave)
    return power_of_two(-(-runs // programs) * interleave)


def power_of_two(n: int) -> int:
    """The least power of two that is at least `n`; Triton's blocks have such extents only."""
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of the card; a few where the interpreter plays it."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
