"""Environment variables that change what programs compute or where they run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from powerinfer_bridge.doctor.finding import Finding, note, warning

THRESHOLD, THREADS = "LLAMA_SPARSE_PRED_THRESHOLD", "OMP_NUM_THREADS"
DEVICES, OFFLINE = "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE"


def variable_findings(
    environment: Mapping[str, str], *, usable_threads: int, has_gpu: bool
) -> Iterator[Finding]:
    """Judge the environment.

    Args:
        environment: variables by name.
        usable_threads: hardware threads open to this process.
        has_gpu: whether the machine has an NVIDIA card.
    """
    if THRESHOLD in environment:
        yield _threshold(environment[THRESHOLD])
    if THREADS in environment:
        yield _threads(environment[THREADS], usable_threads)
    if DEVICES in environment:
        yield _devices(environment[DEVICES], has_gpu)
    if environment.get(OFFLINE, "").lower() in ("1", "on", "true", "yes"):
        yield note(OFFLINE, "set: models and data that are not on this disk yet are not fetched")


def _threshold(value: str) -> Finding:
    try:
        threshold = float(value)
    except ValueError:
        threshold = math.nan
    said = f"{threshold:g}" if math.isfinite(threshold) else f"{value!r}, which is no number"
    found = f"{said}: a PowerInfer run by hand takes it instead of the file's threshold"
    return warning(THRESHOLD, found, f"unset {THRESHOLD}; psp's own runs leave it out")


def _threads(value: str, usable: int) -> Finding:
    first = value.split(",")[0].strip()
    if not (first.isascii() and first.isdigit() and int(first)):
        return warning(THREADS, f"{value!r} is no number of threads", f"unset {THREADS}")
    if int(first) > usable:
        found = f"{first} threads, {usable} can run at the same time"
        return warning(THREADS, found, f"unset it, or set it to {usable}")
    return note(THREADS, f"{first}: torch takes so many threads unless told --threads")


def _devices(value: str, has_gpu: bool) -> Finding:
    hidden = not value.strip() or value.strip().startswith("-")
    if hidden and has_gpu:
        found = "hides all GPUs: everything runs on the CPU"
        return warning(DEVICES, found, f"unset {DEVICES} to use the GPU")
    said = "hides all GPUs, there are none" if hidden else f"only GPU {value} is visible"
    return note(DEVICES, said)
