"""Counters that every launch finds at zero and leaves at zero.

S3 counts the programs that have arrived (`triton_down.last_adds_up`). Clearing counters before
each launch would be a launch of its own, a quarter of the operator's time; so the kernel clears
them, and here we see to it that no two launches that may overlap share one:

- outside a CUDA graph: a set for each stream, on which launches follow each other;
- inside one: a set for each captured launch, since the graph may be replayed on any stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_WORDS = 1 << 18
"""1 MiB of int32 a device: enough for thousands of captured launches, 16 counters each for 7B."""


@dataclass
class _Arena:
    """Zeros of one device, handed out once each."""

    words: Tensor
    used: int = 0
    of_stream: dict[int, Tensor] = field(default_factory=dict)

    def take(self, count: int) -> Tensor | None:
        """The next `count` counters, or None if they are used up."""
        if self.used + count > self.words.numel():
            return None
        self.used += count
        return self.words[self.used - count : self.used]


_arenas: dict[torch.device, _Arena] = {}


def tickets(device: torch.device, count: int) -> Tensor:
    """At least `count` zeroed counters, int32, that no overlapping launch uses.

    Args:
        device: CUDA device, or the CPU for the interpreter.
        count: Tiles of the launch.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    capturing = torch.cuda.is_current_stream_capturing()
    arena = _arenas.get(device) if capturing else _arena(device)
    if arena is None:
        # Captured before any launch outside a graph: correct, at the price of one more node.
        return torch.zeros(count, dtype=torch.int32, device=device)
    return _of_graph(arena, device, count) if capturing else _of_stream(arena, device, count)


def _arena(device: torch.device) -> _Arena:
    """The device's zeros, made at the first launch outside a graph."""
    if device not in _arenas:
        words = torch.zeros(_WORDS, dtype=torch.int32, device=device)
        # Other streams will use them without waiting for this one.
        torch.cuda.synchronize(device)
        _arenas[device] = _Arena(words)
    return _arenas[device]


def _of_graph(arena: _Arena, device: torch.device, count: int) -> Tensor:
    """Counters for one captured launch alone."""
    taken = arena.take(count)
    return torch.zeros(count, dtype=torch.int32, device=device) if taken is None else taken


def _of_stream(arena: _Arena, device: torch.device, count: int) -> Tensor:
    """The stream's counters, kept outside the arena's budget so that streams cannot use it up."""
    stream = torch.cuda.current_stream(device).cuda_stream
    if stream not in arena.of_stream or arena.of_stream[stream].numel() < count:
        # Zeroed on this very stream, hence before the launch that asks for them.
        arena.of_stream[stream] = torch.zeros(count, dtype=torch.int32, device=device)
    return arena.of_stream[stream]
