"""Measured launches: try a short list of ways to cut an operator up, keep the fastest.

Called explicitly, never by an operator: tuning needs the device's clock, repeats, and data of the
sparsity that will be met, none of which a call in the middle of a model can offer.

Two things make it a matter of seconds. All candidates are compiled first, on all cores. And they
are timed in CUDA graphs, a few milliseconds each: a call from Python takes ten times as long as
the kernel, so that events around single calls time the host.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparse_operators.cuda import compiling_in, down, on_device, problem_of, up, up_down_fused
from sparse_operators.timing import Operation, time_graphs
from sparse_operators.triton_launch import Launch, Operator, Problem, candidates

Measure = Callable[[Operation, int], float]
"""Returns the time of a call, given how many slots there are; infinity if it cannot run."""

Run = Callable[[Launch, int, int], object]
"""Runs an operator as a launch says, on the scores of a number, in a slot."""

_REPLAYS = 3

_HOPELESS = 1.25
"""A candidate that takes so many times the fastest's time in the first case meets no other."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was measured.

    Attributes:
        chosen: The choices for `up`, `down` and `up_down`, the last one None unless an FFN with the
            fused kernel beat one with the chosen `up` and `down`.
        tried: Times of every candidate in the cases that it met.
        ffn: Times of a whole FFN with the chosen `up` and `down`, case by case.
        fused_ffn: With the fused kernel.
    """

    chosen: dict[Problem, Launch | None]
    tried: dict[Operator, dict[Launch, list[float]]]
    ffn: list[float]
    fused_ffn: list[float]


def graph_seconds(operation: Operation, slots: int) -> float:
    """Median seconds of a call in a CUDA graph, whose calls each read other weights."""
    from triton.runtime.errors import OutOfResources

    try:
        return median(time_graphs({"it": operation}, slots, _REPLAYS)["it"])
    except OutOfResources:
        return float("inf")


def tune(
    scores: Sequence[Tensor], x: Tensor, weights: Tensor, measure: Measure = graph_seconds
) -> Tuning:
    """Measure how one token's operators are best cut up.

    Args:
        scores: `(slots, 1, d_ff)` for each sparsity to tune for, contiguous. A launch cannot depend
            on the sparsity, so the chosen one has the least mean time, relative to the fastest's.
        x: `(slots, 1, d_model)`, contiguous.
        weights: `(slots, d_ff, d_model)`, contiguous; read by turns, either as `w1` or as `w2t`. So
            many that a cache holds none of them until its next turn, or the cache is tuned for.
        measure: How to time a call.
    """
    runs, slots = _runs(scores, x, weights), len(weights)
    chosen: dict[Problem, Launch | None] = {}
    tried: dict[Operator, dict[Launch, list[float]]] = {}
    with on_device(x.device):
        problems = {name: problem_of(name, scores[0][0], x.shape[-1]) for name in runs}
        _compile(problems, runs)
        for name, problem in problems.items():
            reads = 2 if name == "up_down" else 1
            timed = partial(_time, measure, runs[name], slots, reads)
            tried[name] = _times(problem, timed, range(len(scores)))
            chosen[problem] = _fastest(tried[name])
        best = {name: _fastest(tried[name]) for name in problems}
        whole = {
            fused: [
                measure(Operation(run=_ffn(scores[case], x, weights, best, fused), slots=3), slots)
                for case in range(len(scores))
            ]
            for fused in (False, True)
        }
    if _relative(whole[True], whole[False]) >= 1:
        chosen[problems["up_down"]] = None
    return Tuning(chosen=chosen, tried=tried, ffn=whole[False], fused_ffn=whole[True])


def _ffn(
    scores: Tensor, x: Tensor, weights: Tensor, best: Mapping[Operator, Launch], fused: bool
) -> Callable[[int], Tensor]:
    """A whole FFN, its gate dense: what the fused kernel saves alone it may lose behind a gate."""

    def run(slot: int) -> Tensor:
        token, taken = scores[slot], x[slot]
        linear(taken, weights[slot])
        w1, w2t = (weights[(slot + step) % len(weights)] for step in (1, 2))
        if fused:
            return up_down_fused(token, taken, w1, w2t, launch=best["up_down"])
        return down(up(token, taken, w1, launch=best["up"]), w2t, launch=best["down"])

    return run


def _runs(scores: Sequence[Tensor], x: Tensor, weights: Tensor) -> dict[Operator, Run]:
    intermediate = [
        torch.stack(
            [up(*given, deterministic=True) for given in zip(each, x, weights, strict=True)]
        )
        for each in scores
    ]

    def run_up(launch: Launch, case: int, slot: int) -> Tensor:
        return up(scores[case][slot], x[slot], weights[slot], launch=launch)

    def run_down(launch: Launch, case: int, slot: int) -> Tensor:
        return down(intermediate[case][slot], weights[slot], launch=launch)

    def run_fused(launch: Launch, case: int, slot: int) -> Tensor:
        w1, w2t = weights[slot], weights[(slot + 1) % len(weights)]
        return up_down_fused(scores[case][slot], x[slot], w1, w2t, launch=launch)

    return {"up": run_up, "down": run_down, "up_down": run_fused}


def _compile(problems: dict[Operator, Problem], runs: dict[Operator, Run]) -> None:
    """Compile every candidate, as many at a time as there are cores; run none."""
    with ThreadPoolExecutor(os.cpu_count()) as pool, compiling_in(pool):
        for operator, problem in problems.items():
            for launch in candidates(problem):
                runs[operator](launch, 0, 0)


def _time(measure: Measure, run: Run, slots: int, reads: int, launch: Launch, case: int) -> float:
    return measure(Operation(run=partial(run, launch, case), slots=reads), slots)


def _times(
    problem: Problem, time: Callable[[Launch, int], float], cases: range
) -> dict[Launch, list[float]]:
    """The candidates' times in each case, or in the first alone where that leaves no hope."""
    first, *others = cases
    tried = {launch: [time(launch, first)] for launch in candidates(problem)}
    limit = _HOPELESS * min(found for (found,) in tried.values())
    for launch, found in tried.items():
        if found[0] <= limit:
            found += [time(launch, case) for case in others]
    return tried


def _fastest(tried: dict[Launch, list[float]]) -> Launch:
    """The candidate of least time, the earliest of equals, among those that met every case."""
    cases = max(len(times) for times in tried.values())
    met = {launch: times for launch, times in tried.items() if len(times) == cases}
    least = [min(times) for times in zip(*met.values(), strict=True)]
    return min(met, key=lambda each: _relative(met[each], least))


def _relative(times: list[float], others: list[float]) -> float:
    return fmean(time / other for time, other in zip(times, others, strict=True))
