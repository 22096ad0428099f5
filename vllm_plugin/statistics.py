"""Activation statistics of a server's real traffic, in PowerInfer's files.

`DIR/activation/activation_N.pt` are what `psp gpu-split --statistics DIR` reads; `statistics.json`
says whose they are. Counts of neurons and of tokens are all that is kept: no text and no ids.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from common.errors import PredictorError, PspError, printable
from common.sealed import read_sealed, write_sealed
from gguf_export.pwri.statistics import read_statistics, write_statistics
from vllm_plugin.register import LOGGER

FILE = "statistics.json"
INTERVAL, PAUSE = 30.0, 1.0
"""Seconds between two writes under load, and without a step after which there is one anyway.

vLLM kills its workers when it is told to end, so nothing may be left for then.
"""

_KIND = "psp.served_statistics"
_OTHER = "name another directory"


@dataclass
class Statistics:
    """The counts of a model that is being served.

    Attributes:
        directory: where they go.
        model: what tells whose they are, as JSON.
        layers: the counts that grow while the model runs, per layer (d_ff + 1,) int64; the last
            one is of tokens.
    """

    directory: Path
    model: dict[str, Any]
    layers: Sequence[Tensor]
    _before: Tensor = field(init=False)
    _lock: IO[str] = field(init=False)
    _written: Tensor | None = None
    _stepped: float = 0.0
    _wrote: float = field(default_factory=time.monotonic)
    _ended: threading.Event = field(default_factory=threading.Event)
    _watcher: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        """Go on from what the directory holds.

        Raises:
            PspError: it is another model's, damaged, in use, or cannot be written.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = (self.directory / ".lock").open("a+")
        except OSError as error:
            raise PredictorError(f"{self.directory}: {error.strerror}", _OTHER) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._before = self._read()
        except OSError:
            self._lock.seek(0)
            process = printable(self._lock.read(20).strip()) or "unknown"
            self._lock.close()
            raise PredictorError(
                f"{self.directory}: another server counts there, process {process}",
                f"end it if it was left behind, or {_OTHER}",
            ) from None
        except PspError:
            self._lock.close()
            raise
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _read(self) -> Tensor:
        n_layers, d_ff = len(self.layers), len(self.layers[0]) - 1
        before = torch.zeros(n_layers, d_ff + 1, dtype=torch.int64)
        file = self.directory / FILE
        if file.exists():
            found = read_sealed(file, PredictorError, _OTHER)
            tokens = found.get("tokens")
            if found.get("kind") != _KIND or not isinstance(tokens, int):
                raise PredictorError(f"{file}: is not the plugin's", _OTHER)
            if found.get("model") != self.model:
                raise PredictorError(f"{self.directory}: holds another model's counts", _OTHER)
            before[:, :-1] = torch.stack(read_statistics(self.directory, n_layers, d_ff))
            before[:, -1] = tokens
            if before.max() > tokens:
                raise PredictorError(
                    f"{self.directory}: counts more tokens than {FILE} tells of", _OTHER
                )
        return before

    def step(self) -> None:
        """Take note that the model has run."""
        self._stepped = time.monotonic()

    def due(self, now: float) -> bool:
        """Whether it is time to write: some has gone by under load, or the server has paused."""
        paused = self._stepped > self._wrote and now - self._stepped >= PAUSE
        return paused or (self._stepped > self._wrote and now - self._wrote >= INTERVAL)

    def _watch(self) -> None:
        while not self._ended.wait(PAUSE / 2):
            if self.due(time.monotonic()):
                self.save()

    def close(self) -> None:
        """Write, and let others count there."""
        self._ended.set()
        self._watcher.join()
        self.save()
        self._lock.close()

    def save(self) -> None:
        """Write, if there is something new."""
        self._wrote = time.monotonic()
        self._write(self._now())

    def _now(self) -> Tensor:
        return torch.stack([layer.cpu() for layer in self.layers]) + self._before

    def _write(self, counts: Tensor) -> None:
        if not counts[0, -1] or (self._written is not None and self._written.equal(counts)):
            return
        tokens = int(counts[0, -1])
        try:
            write_statistics(self.directory, [layer[:-1].clone() for layer in counts])
            sparsity = 1 - counts[:, :-1].double().mean().item() / tokens
            facts = {"tokens": tokens, "activation_sparsity": sparsity, "model": self.model}
            write_sealed(self.directory / FILE, {"kind": _KIND, "schema_version": 1, **facts})
            self._written = counts
        except PspError as error:
            logging.getLogger(LOGGER).warning("activation statistics are not written: %s", error)
