"""Measured launches: try a short list of ways to cut an operator up, keep the fastest.

Called explicitly, never by an operator: tuning needs the device's clock, repeats, and data of the
sparsity that will be met, none of which a call in the middle of a model can offer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

from torch import Tensor

from sparse_operators.cuda import down, on_device, problem_of, up, up_down_fused
from sparse_operators.triton_launch import Launch, Operator, Problem, candidates

Measure = Callable[[Callable[[], object]], float]
"""Runs a call often enough to return its time; infinity if it cannot run."""

Run = Callable[[Launch, int], object]
"""Runs an operator as a launch says, on the scores of a number."""


def cold_median(call: Callable[[], object]) -> float:
    """Median milliseconds on the GPU, the L2 cache flushed before each call."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(call, warmup=10, rep=50, return_mode="median"))
    except OutOfResources:
        return float("inf")


def tune(
    scores: Sequence[Tensor], x: Tensor, w1: Tensor, w2t: Tensor, measure: Measure = cold_median
) -> dict[Problem, Launch | None]:
    """Measure how one token's operators are best cut up.

    Args:
        scores: `(1, d_ff)` for each sparsity to tune for, contiguous. A launch cannot depend on
            the sparsity, so the chosen one has the least mean time, relative to the fastest's.
        x: `(1, d_model)`, contiguous.
        w1: `(d_ff, d_model)`, contiguous.
        w2t: `(d_ff, d_model)`, contiguous.
        measure: How to time a call.

    Returns:
        The choices for `up`, `down` and `up_down`, the last one None unless the fused kernel beat
        the chosen `up` and `down` together.
    """
    intermediate = [up(s, x, w1, deterministic=True) for s in scores]

    runs: dict[Operator, Run] = {
        "up": lambda launch, case: up(scores[case], x, w1, launch=launch),
        "down": lambda launch, case: down(intermediate[case], w2t, launch=launch),
        "up_down": lambda launch, case: up_down_fused(scores[case], x, w1, w2t, launch=launch),
    }
    cases, d_model = range(len(scores)), x.shape[1]
    chosen: dict[Problem, Launch | None] = {}
    times = []
    for operator, run in runs.items():
        problem = problem_of(operator, scores[0], d_model)
        with on_device(x.device):
            chosen[problem], found = _fastest(problem, run, cases, measure)
        times.append(found)
    chain = [sum(parts) for parts in zip(*times[:2], strict=True)]
    if _relative(times[2], chain) >= 1:
        chosen[problem] = None
    return chosen


def _fastest(
    problem: Problem, run: Run, cases: range, measure: Measure
) -> tuple[Launch, list[float]]:
    """The candidate of least time, the earliest of equals, and its time in each case."""
    timed = {
        launch: [measure(partial(run, launch, case)) for case in cases]
        for launch in candidates(problem)
    }
    least = [min(times) for times in zip(*timed.values(), strict=True)]
    launch = min(timed, key=lambda each: _relative(timed[each], least))
    return launch, timed[launch]


def _relative(times: list[float], others: list[float]) -> float:
    return fmean(time / other for time, other in zip(times, others, strict=True))
