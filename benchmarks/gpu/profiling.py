"""What a card computes while something runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.gpu.kit import Absent

_TOLD = 12
_LETTERS = 120


@dataclass(frozen=True)
class Kernels:
    """What ran on a card, copies included.

    Attributes:
        seconds: by name, those of all streams added up.
    """

    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        """Seconds of all; more than went by where streams ran side by side."""
        return sum(self.seconds.values())

    @property
    def most(self) -> dict[str, float]:
        """The few that took most."""
        found = sorted(self.seconds.items(), key=lambda kernel: -kernel[1])
        return {name[:_LETTERS]: seconds for name, seconds in found[:_TOLD]}


def watch(work: Callable[[], object]) -> Kernels:
    """Run something, which waits for the card itself, and return what ran there.

    Raises:
        Absent: the card may not be watched.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
    seconds: dict[str, float] = {}
    for event in found.events() or ():
        if event.device_type.name == "CUDA":
            seconds[event.name] = seconds.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e6
    if not seconds:
        raise Absent("torch's profiler saw no kernels: CUPTI may not be allowed here")
    return Kernels(seconds)
