"""Copies between the memory of this machine and a device's that nobody waits for.

A GPU copies to and from pinned memory by itself while it computes. Where there is none, everything
is done in its turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_STAGE = 1 << 25
"""Bytes of a piece in which large tensors are sent."""


def has_streams(device: torch.device) -> bool:
    """Whether a device copies by itself, in several streams."""
    return device.type == "cuda"


class Beside:
    """A stream beside the one that a device computes in; nothing on other devices."""

    def __init__(self, device: torch.device) -> None:
        """Make the stream."""
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if has_streams(device):
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def after(self, *used: torch.Tensor) -> Iterator[None]:
        """Do the block's work beside what follows, but after what was begun so far.

        Args:
            used: tensors that the block reads, made outside; they may be dropped at once.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        for tensor in used:
            tensor.record_stream(self._stream)

    @contextmanager
    def meanwhile(self, *used: torch.Tensor) -> Iterator[None]:
        """Do the block's work beside everything else, and wait for nothing.

        Args:
            used: tensors that the block reads, made outside or here, and there already.
        """
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        for tensor in used:
            tensor.record_stream(self._stream)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Do the block's work beside everything else, and wait for it at the end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def taken(self, *tensors: torch.Tensor) -> None:
        """Let the current stream use tensors that were made here, and drop them when it likes."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream(self._device))

    def done(self) -> Done:
        """Return what tells when all that was begun here is done."""
        if self._stream is None:
            return Done()
        # Who waits for it sleeps: several threads do, and torch's own way keeps a core busy each.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return Done(event)


class Done:
    """Tells when work on a device is done."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        """Take the event; None is done already."""
        self._event = event

    def wait(self) -> None:
        """Wait for it, letting other threads run."""
        if self._event is not None:
            self._event.synchronize()


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a small tensor of the CPU's on a device, without waiting for it."""
    if not has_streams(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fetched(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in memory of the CPU's, there once the work of the current stream is done."""
    if not has_streams(tensor.device):
        return tensor.cpu()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


class Staging:
    """Sends large tensors of the CPU's, mapped files too, in pieces by way of pinned memory.

    Reading one piece and sending the one before it go on at the same time.
    """

    def __init__(self, device: torch.device) -> None:
        """Take the memory."""
        self._device, self._pinned = device, has_streams(device)
        self._buffers = [
            torch.empty(_STAGE, dtype=torch.uint8, pin_memory=True) for _ in range(2 * self._pinned)
        ]
        self._sent = [
            torch.cuda.Event()  # type: ignore[no-untyped-call]
            for _ in self._buffers
        ]
        self._turn = 0

    def send(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy a contiguous tensor to one of its shape and type on the device."""
        if not self._pinned:
            target.copy_(source)
            return
        pieces = (torch.split(_bytes(tensor), _STAGE) for tensor in (source, target))
        for piece, place in zip(*pieces, strict=True):
            buffer, event = self._buffers[self._turn][: len(piece)], self._sent[self._turn]
            event.synchronize()  # one that was never recorded is done
            place.copy_(buffer.copy_(piece), non_blocking=True)
            event.record(torch.cuda.current_stream(self._device))
            self._turn ^= 1


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
