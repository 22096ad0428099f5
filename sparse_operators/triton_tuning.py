"""Measured launches: try a short list of ways to cut an operator up, keep the fastest.

Called explicitly, never by an operator: tuning needs the device's clock, repeats, and data of the
sparsity that will be met, none of which a call in the middle of a model can offer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist

import torch
from torch import Tensor

from sparse_operators.triton_kernels import down, up, up_down_fused
from sparse_operators.triton_launch import (
    TENSOR_CORE_ROWS,
    Launch,
    Problem,
    default_launch,
    tuned,
)

Measure = Callable[[Callable[[], object]], float]
"""Runs a call often enough to return its time; infinity if it cannot run."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What to tune for.

    Attributes:
        d_model: Columns of the weights.
        d_ff: Rows of the weights.
        tokens: 1 to 8.
        dtype: float16, bfloat16 or float32.
        sparsity: Share of inactive neurons of one token, neither 0 nor 1.
        device: A CUDA device.
    """

    d_model: int
    d_ff: int
    tokens: int = 1
    dtype: torch.dtype = torch.float16
    sparsity: float = 0.88
    device: str = "cuda"


def tune(shape: Shape, measure: Measure | None = None) -> dict[Problem, Launch]:
    """Measure and remember the launches of one shape, for this process.

    Args:
        shape: Shape, type, sparsity and device.
        measure: How to time a call; on a cold L2 cache if None.

    Returns:
        The choices made, as they now stand in `triton_launch.tuned`. `up_down` is among them only
        if the fused kernel beat the chosen `up` and `down` together.
    """
    time = measure or cold_median
    scores, x, w1, w2t = random_inputs(shape)
    x1 = up(scores, x, w1)
    first = Problem(
        operator="up",
        tokens=shape.tokens,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        dtype=shape.dtype,
        device=x.device,
    )
    second, both = replace(first, operator="down"), replace(first, operator="up_down")
    up_launch, up_time = _fastest(first, lambda c: up(scores, x, w1, launch=c), time)
    down_launch, down_time = _fastest(second, lambda c: down(x1, w2t, launch=c), time)
    chosen = {first: up_launch, second: down_launch}
    if shape.tokens == 1:
        launch, fused_time = _fastest(
            both, lambda c: up_down_fused(scores, x, w1, w2t, launch=c), time
        )
        if fused_time < up_time + down_time:
            chosen[both] = launch
    tuned.pop(both, None)
    tuned.update(chosen)
    return chosen


def candidates(problem: Problem) -> Iterator[Launch]:
    """The default first, then its neighbours: fewer or more programs, rows, warps, stages."""
    base = default_launch(problem)
    yield base
    single = problem.tokens == 1
    groups = (base.group // 2, base.group, base.group * 2)
    for scale, group, warps, stages in itertools.product(
        (0.5, 1.0, 2.0), groups, (4, 8), (1, 2, 3)
    ):
        programs = min(problem.d_ff, max(1, int(base.programs * scale)))
        if group < (1 if single else TENSOR_CORE_ROWS) or (scale, stages) == (0.5, 2):
            continue
        launch = replace(base, programs=programs, group=group, warps=warps, stages=stages)
        if launch != base:
            yield launch


def random_inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of the wanted sparsity, `x`, `w1` and `w2t`, always the same ones."""
    generator = torch.Generator(device=shape.device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=shape.device)

    scores = normal(shape.tokens, shape.d_ff) - NormalDist().inv_cdf(shape.sparsity)
    x = normal(shape.tokens, shape.d_model)
    w1, w2t = (normal(shape.d_ff, shape.d_model) / shape.d_model**0.5 for _ in range(2))
    scores, x, w1, w2t = (a.to(shape.dtype) for a in (scores, x, w1, w2t))
    return scores, x, w1, w2t


def cold_median(call: Callable[[], object]) -> float:
    """Median milliseconds on the GPU, the L2 cache flushed before each call."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(call, warmup=10, rep=50, return_mode="median"))
    except OutOfResources:
        return float("inf")


def _fastest(
    problem: Problem, run: Callable[[Launch], object], time: Measure
) -> tuple[Launch, float]:
    """The candidate of least time, the earliest of equals."""
    timed = {launch: time(partial(run, launch)) for launch in candidates(problem)}
    launch = min(timed, key=timed.__getitem__)
    return launch, timed[launch]
