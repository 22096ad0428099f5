"""How long operations take, run by turns so that all of them meet the same disturbances.

And what bounds that: the caches that a benchmark must exceed, and the memory that none can.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.machine import ROOT
from common.units import MIB, parse_size

Samples = dict[str, list[float]]
"""Seconds of single calls by the operation's name, in the order in which they were measured."""

Clock = Callable[[Callable[[int], object], int], float]
"""Returns the seconds that a call with the number of a slot takes."""

_GRAPH_CALLS = 96
"""Least calls of a CUDA graph, which share the time of its launch: about 12 µs on an H100."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Something to time.

    Attributes:
        run: called with the number of a slot, the first of those that the call may read.
        slots: how many slots a call reads.
    """

    run: Callable[[int], object]
    slots: int = 1


def time_calls(
    operations: Mapping[str, Operation], slots: int, repeats: int, clock: Clock
) -> Samples:
    """Time single calls after one untimed turn.

    Every call reads the slots after those of the call before. So a slot has left the cache by the
    time it is read again, if all slots together are large enough.

    Args:
        operations: by name; one turn runs each of them once, in order.
        slots: how many there are, after which the first is read again.
        repeats: timed turns.
        clock: `wall_seconds` on the CPU; `gpu_seconds`, the host's launches included, on a GPU.
    """
    samples: Samples = {name: [] for name in operations}
    slot = 0
    for _ in range(repeats + 1):
        for name, operation in operations.items():
            samples[name].append(clock(operation.run, slot))
            slot = (slot + operation.slots) % slots
    return {name: times[1:] for name, times in samples.items()}


def time_graphs(operations: Mapping[str, Operation], slots: int, repeats: int) -> Samples:
    """Time calls on a GPU inside CUDA graphs, one graph an operation, so that no launch counts.

    A graph calls its operation on all slots, many times if they are few; a sample is a replay's
    time divided by the number of calls.
    """
    rounds = math.ceil(_GRAPH_CALLS / slots)
    replays = {
        name: _replay(_capture(operation, slots, rounds)) for name, operation in operations.items()
    }
    samples = time_calls(replays, slots, repeats, gpu_seconds)
    calls = slots * rounds
    return {name: [time / calls for time in times] for name, times in samples.items()}


def _replay(graph: torch.cuda.CUDAGraph) -> Operation:
    return Operation(run=lambda slot: graph.replay())


def wall_seconds(run: Callable[[int], object], slot: int) -> float:
    """Time a call by the wall clock."""
    start = time.perf_counter()
    run(slot)
    return time.perf_counter() - start


def gpu_seconds(run: Callable[[int], object], slot: int) -> float:
    """Time a call on a GPU between CUDA events."""
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    torch.cuda.synchronize()
    start.record()
    run(slot)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _capture(operation: Operation, slots: int, rounds: int) -> torch.cuda.CUDAGraph:
    # Kernels are compiled and libraries set up outside the graph, on a stream of their own.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        operation.run(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(slots * rounds):
            operation.run(call * operation.slots % slots)
    return graph


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high


def cache_bytes(device: torch.device, root: Path = ROOT) -> int:
    """Return the size of the largest cache before the device's memory.

    That is the L2 of a GPU, the last level of a CPU as Linux tells it below `root`, else 64 MiB.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    files = (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    # sysfs writes 2048K.
    return max((parse_size(f"{file.read_text().strip()}iB") for file in files), default=64 * MIB)


def stream(matrix: Tensor) -> Tensor:
    """Read a matrix once, in order, with nothing to compute worth mentioning.

    Half types are read as if they were float32, whose sum costs the CPU less.
    """
    pairs = matrix.dtype.itemsize == 2 and matrix.shape[-1] % 2 == 0
    return (matrix.view(torch.float32) if pairs else matrix).sum()
