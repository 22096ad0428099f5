"""`this`: what the machine's own memory gives to a number of threads, measured now."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from common.machine import read_memory
from cost_model.hardware import THREAD_SECONDS, Device, Efficiency, Hardware, HardwareError, Link

Bytes = npt.NDArray[np.uint8]

ROW_BYTES = 8192
"""A neuron's row of LLaMA-7B in F16: d_model 4096 · 2 bytes."""

ARRAY_BYTES = 1 << 30
"""More than the last-level cache of any CPU of today (AMD EPYC 9684X: 1152 MiB over twelve chips,
of which a core fills its own 96 MiB)."""

UNCALIBRATED = "PowerInfer's kernels reach less than a plain read; --calibrate fits them"
"""What `this` must be told with until it is calibrated."""

_PASSES = 5
_GPU_BYTES = 1 << 30
_BATCH_ROWS = 32
"""Rows gathered at a time: 256 KiB, which stay in a core's L2."""

_PRODUCT = (256, 2048)
"""Tokens, and width of a layer."""

_LAYER_SECONDS, _GPU_LAYER_SECONDS, _GPU_DENSE_LAYER_SECONDS = 50e-6, 250e-6, 60e-6
"""Those of the presets; see hardware.yaml."""


def measure_this(threads: int, array_bytes: int = ARRAY_BYTES) -> Hardware:
    """Measure this machine.

    A streaming read is the maximum over an array of integers, in one pass by `threads` threads; a
    gathered one copies rows of `ROW_BYTES` in random order into a buffer that stays in cache. Each
    is the fastest of five passes: whatever else runs only ever makes it slower. PowerInfer's
    kernels also multiply and convert, so they reach less until `calibrate` says how much.

    Args:
        threads: CPU threads.
        array_bytes: read in a pass.

    Raises:
        HardwareError: too little memory is free.
    """
    memory = read_memory().usable
    if array_bytes > memory // 4:
        raise HardwareError(
            f"--hardware this: reading {array_bytes:,} bytes needs four times as much memory, "
            f"found {memory:,}",
            "pass a preset or a YAML file",
        )
    streamed, gathered = cpu_bandwidths(threads, array_bytes)
    share, compute = gathered / streamed, cpu_compute(threads)
    gpu, link, note = _gpu()
    return Hardware(
        name="this",
        cpu=Device(
            name=f"this machine, --threads {threads}",
            bandwidth=streamed,
            memory=memory,
            efficiency=Efficiency(matrix=1.0, rows=share, columns=share),
            layer_seconds=_LAYER_SECONDS,
            compute=compute,
            source=f"measured: streaming {streamed / 1e9:.1f} GB/s, rows of 8 KiB in random order "
            f"{gathered / 1e9:.1f} GB/s, products in float32 {compute / 1e9:.0f} GFLOP/s; "
            f"{_LAYER_SECONDS * 1e6:.0f} µs a layer assumed",
        ),
        gpu=gpu,
        link=link,
        threads=threads,
        thread_seconds=THREAD_SECONDS,
        notes=(UNCALIBRATED, note),
    )


def cpu_bandwidths(threads: int, array_bytes: int) -> tuple[float, float]:
    """Return bytes per second of a streaming and of a gathering read."""
    rows = max(1, array_bytes // ROW_BYTES // threads) * threads
    memory = np.ones((rows, ROW_BYTES), dtype=np.uint8)
    order = np.random.default_rng(0).permutation(rows)
    parts, orders = np.split(memory, threads), np.split(order, threads)
    with ThreadPoolExecutor(threads) as pool:
        streamed = _fastest(lambda: list(pool.map(_stream, parts)))
        gathered = _fastest(lambda: list(pool.map(lambda at: _gather(memory, at), orders)))
    return memory.nbytes / streamed, memory.nbytes / gathered


def cpu_compute(threads: int) -> float:
    """Return the operations per second of a layer's product, float32."""
    import torch

    rows, width = _PRODUCT
    weights, inputs = torch.ones(width, width), torch.ones(rows, width)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return 2 * rows * width * width / _fastest(lambda: inputs @ weights)
    finally:
        torch.set_num_threads(before)


def _stream(part: Bytes) -> int:
    return int(part.view(np.int64).max())


def _gather(memory: Bytes, order: npt.NDArray[np.intp]) -> None:
    buffer = np.empty((_BATCH_ROWS, ROW_BYTES), dtype=np.uint8)
    for start in range(0, len(order), _BATCH_ROWS):
        batch = order[start : start + _BATCH_ROWS]
        # Any other mode copies through a second buffer.
        np.take(memory, batch, axis=0, out=buffer[: len(batch)], mode="clip")


def _fastest(action: Callable[[], Any]) -> float:
    """Return the seconds of the fastest pass."""
    taken = []
    for _ in range(_PASSES):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _gpu() -> tuple[Device | None, Link | None, str]:
    """Measure the first CUDA device; without one return nothing but a note."""
    import torch

    if not torch.cuda.is_available():
        return None, None, "torch sees no GPU"
    place = torch.device("cuda", 0)
    facts = torch.cuda.get_device_properties(place)
    size = min(_GPU_BYTES, facts.total_memory // 8)
    host = torch.ones(size // 4, dtype=torch.float32).pin_memory()
    there = host.to(place)
    scalar = torch.ones(1).pin_memory()

    def timed(action: Callable[[], Any]) -> float:
        def run() -> None:
            action()
            torch.cuda.synchronize(place)

        run()
        return _fastest(run)

    read = size / timed(lambda: there.sum())
    crossed = size / timed(lambda: there.copy_(host))
    copy = timed(lambda: scalar.to(place))
    gpu = Device(
        name=facts.name,
        bandwidth=read,
        memory=facts.total_memory,
        efficiency=Efficiency(matrix=1.0, rows=1.0, columns=0.5),
        layer_seconds=_GPU_LAYER_SECONDS,
        dense_layer_seconds=_GPU_DENSE_LAYER_SECONDS,
        source=f"measured: a sum reads {read / 1e9:.0f} GB/s; rows, columns and what a layer costs "
        "are assumed (hardware.yaml)",
    )
    link = Link(
        bandwidth=crossed,
        efficiency=1.0,
        copy_seconds=copy,
        source=f"measured: {crossed / 1e9:.1f} GB/s from pinned memory, {copy * 1e6:.0f} µs a copy",
    )
    return gpu, link, "the GPU's figures are measured with torch, not with PowerInfer"
