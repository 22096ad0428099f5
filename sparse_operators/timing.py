"""How long operations take, run by turns so that all of them meet the same disturbances."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Samples = dict[str, list[float]]
"""Seconds of single calls by the operation's name, in the order in which they were measured."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Something to time.

    Attributes:
        run: called with the number of a slot, the first of those that the call may read.
        slots: how many slots a call reads.
    """

    run: Callable[[int], object]
    slots: int = 1


def time_calls(operations: Mapping[str, Operation], slots: int, repeats: int) -> Samples:
    """Time single calls on the CPU by the wall clock, after one untimed turn.

    Every call reads the slots after those of the call before. So a slot has left the cache by the
    time it is read again, if all slots together are large enough.

    Args:
        operations: by name; one turn runs each of them once, in order.
        slots: how many there are, after which the first is read again.
        repeats: timed turns.
    """
    samples: Samples = {name: [] for name in operations}
    slot = 0
    for _ in range(repeats + 1):
        for name, operation in operations.items():
            start = time.perf_counter()
            operation.run(slot)
            samples[name].append(time.perf_counter() - start)
            slot = (slot + operation.slots) % slots
    return {name: times[1:] for name, times in samples.items()}


def time_launches(operations: Mapping[str, Operation], slots: int, repeats: int) -> Samples:
    """Time single calls on a GPU between CUDA events, the host's launches included."""
    samples: Samples = {name: [] for name in operations}
    slot = 0
    for _ in range(repeats + 1):
        for name, operation in operations.items():
            torch.cuda.synchronize()
            with _between_events(samples[name]):
                operation.run(slot)
            slot = (slot + operation.slots) % slots
    return {name: times[1:] for name, times in samples.items()}


def time_graphs(operations: Mapping[str, Operation], slots: int, repeats: int) -> Samples:
    """Time calls on a GPU inside CUDA graphs, one graph an operation, so that no launch counts.

    A graph calls its operation `slots` times, on other slots each time; a sample is a replay's
    time divided by that.
    """
    graphs = {name: _capture(operation, slots) for name, operation in operations.items()}
    samples: Samples = {name: [] for name in operations}
    for _ in range(repeats + 1):
        for name, graph in graphs.items():
            with _between_events(samples[name]):
                graph.replay()
    return {name: [time / slots for time in times[1:]] for name, times in samples.items()}


class _between_events:
    """Appends the GPU's seconds between entry and exit to a list."""

    def __init__(self, times: list[float]) -> None:
        self._times = times
        self._start, self._end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )

    def __enter__(self) -> None:
        self._start.record()

    def __exit__(self, *_: object) -> None:
        self._end.record()
        self._end.synchronize()
        self._times.append(self._start.elapsed_time(self._end) / 1000)


def _capture(operation: Operation, slots: int) -> torch.cuda.CUDAGraph:
    # Kernels are compiled and libraries set up outside the graph, on a stream of their own.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        operation.run(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(slots):
            operation.run(call * operation.slots % slots)
    return graph


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high
