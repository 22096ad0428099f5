"""What locks and checksums cost: whole commands with and without them, in turns.

    python -m benchmarks.vouching --model DIR --data FILE --rounds 7 [--only export-gguf]

Collects, trains (recipe svd, which takes the least time beside reading) and exports, with and
without verifying, in a process of their own each, as they are and with functions that neither hash
nor lock in the place of psp's.
Prints one JSON line a command: seconds of the wall and of the processors, medians, and `overhead`,
the median over rounds of the one over the other, less 1. Where other work shares the machine those
say little: `spent_share` is the part of the processors' time that was spent inside these functions.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, ClassVar

import click
import torch
import xxhash

from benchmarks.shared import print_line
from benchmarks.soak_processes import in_child
from common import lock, sealed
from common.hashing import HashedWriter, hash_file
from common.lock import locked
from gguf_export.bundle import export
from gguf_export.settings import SUFFIX, ExportConfig
from powerinfer_bridge.verify.verification import ExportCheck
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.traces import shard_file, store
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig

_NOTHING = "0" * 32
_KINDS = ("with", "without")


class _Hash:
    """Takes everything and looks at nothing."""

    def __init__(self, data: bytes = b"") -> None: ...

    def update(self, data: bytes) -> None: ...

    def hexdigest(self) -> str:
        return _NOTHING


class _Hashes:
    """Stands for `xxhash`, where psp imports it as a module."""

    xxh3_128: ClassVar[type[_Hash]] = _Hash

    @staticmethod
    def xxh3_128_hexdigest(data: bytes) -> str:
        return _NOTHING


def _unread(path: Path, *piece: int) -> tuple[int, str]:
    return path.stat().st_size, _NOTHING


@contextmanager
def _unlocked(out: Path, option: str = "--out") -> Iterator[None]:
    out.parent.mkdir(parents=True, exist_ok=True)
    yield


def _unvouched(*given: object) -> None:
    """Look at nothing."""


def _undigested(file: object) -> str:
    return _NOTHING


def leave_out() -> None:
    """Let this process neither hash nor lock."""
    _replace(
        {
            xxhash: _Hashes,
            xxhash.xxh3_128: _Hash,
            xxhash.xxh3_128_hexdigest: _Hashes.xxh3_128_hexdigest,
            hash_file: _unread,
            locked: _unlocked,
            shard_file.vouch_shard: _unvouched,
            shard_file._digest: _undigested,
        }
    )
    replaced: Any = store.TraceStore
    replaced._refuse_replaced = _unvouched


_BEFORE: dict[str, Callable[[], object]] = {"with": _unvouched, "without": leave_out}


class Spent:
    """Processor seconds inside functions, over all threads of this process."""

    def __init__(self, file: Path) -> None:
        """Keep them in a file when the process ends."""
        self._file, self._inside, self.seconds = file, threading.local(), 0.0

    def counted(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same function, counted where it is not called by another one of them."""

        @wraps(work)
        def count(*given: Any, **named: Any) -> Any:
            if getattr(self._inside, "already", False):
                return work(*given, **named)
            self._inside.already, begun = True, time.thread_time()
            try:
                return work(*given, **named)
            finally:
                self._inside.already = False
                self.seconds += time.thread_time() - begun
                self._file.write_text(str(self.seconds))

        return count

    def count_all(self) -> None:
        """Let this process count whatever hashes and locks."""
        functions = (
            *(hash_file, lock._taken, sealed._checksum, xxhash.xxh3_128_hexdigest),
            *(shard_file.vouch_shard, shard_file._digest),
        )
        _replace({function: self.counted(function) for function in functions})
        methods: tuple[tuple[Any, str], ...] = (
            (store.TraceStore, "_refuse_replaced"),
            (HashedWriter, "_take"),
        )
        for owner, name in methods:
            setattr(owner, name, self.counted(getattr(owner, name)))


def _replace(others: dict[Any, Any]) -> None:
    """Put others in the place of functions, wherever psp's modules have them."""
    root = str(Path(__file__).parents[1])
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None) or ""
        if not file.startswith(root) or "site-packages" in file:  # `.venv` lies in the checkout
            continue
        for name, value in list(vars(module).items()):
            with_other = isinstance(value, type(xxhash) | type | type(_unread)) or callable(value)
            if with_other and value in others:
                setattr(module, name, others[value])


def timed(work: Callable[[], object], before: Callable[[], object]) -> tuple[float, float]:
    """Do two things in a process of their own; return seconds of the wall and of processors."""
    os.sync()  # what the last one has left to be written is not this one's
    begun = time.perf_counter()
    pid = in_child(work, before)
    _, status, used = os.wait4(pid, 0)
    assert status == 0, status
    return time.perf_counter() - begun, used.ru_utime + used.ru_stime


def commands(model: str, data: str, tokens: int, work: Path) -> dict[str, Callable[[], object]]:
    """Return what is timed, in an order in which each has what it reads."""
    traces, predictors = work / "traces", work / "predictors"
    out = work / "export" / f"m{SUFFIX}"
    given = CollectConfig(model=model, data=(data,), out=traces, tokens=tokens, force=True)
    train = TrainConfig(traces=traces, out=predictors, recipe="svd", force=True)
    written = ExportConfig(model=model, predictors=predictors, out=out, force=True)
    return {
        "collect": partial(collect, given),
        "train-predictor": partial(train_predictors, train),
        "export-gguf --no-verify": partial(export, written),
        "export-gguf": partial(export, written, ExportCheck(model, out)),
    }


@click.command()
@click.option("--model", required=True, help="A small checkpoint.")
@click.option("--data", required=True, help="Text.")
@click.option("--tokens", default=20_000, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--only", help="One command; those before it are run once.")
def main(model: str, data: str, tokens: int, rounds: int, only: str | None) -> None:
    """Time every command in turns."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        # A cache would spare the hashing of a model that was hashed before.
        os.environ["PSP_CACHE_DIR"] = f"{place}/cache"
        made = {kind: commands(model, data, tokens, Path(place) / kind) for kind in _KINDS}
        for name in made["with"]:
            if only in (name, None):
                print_line({"command": name, **_compared(made, name, Path(place), rounds)})
            if name == only:
                break
            for kind in _KINDS if only else ():
                timed(made[kind][name], _BEFORE[kind])


def _compared(
    made: dict[str, dict[str, Callable[[], object]]], name: str, place: Path, rounds: int
) -> dict[str, object]:
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in _KINDS}
    for number in range(rounds + 1):
        for kind in _KINDS if number % 2 else reversed(_KINDS):
            seconds = timed(made[kind][name], _BEFORE[kind])
            shutil.rmtree(place / "cache", ignore_errors=True)
            if number:  # the first one warms up
                found[kind].append(seconds)
    spent = place / "spent"
    _, processor = timed(made["with"][name], Spent(spent).count_all)
    share = float(spent.read_text()) / processor
    facts: dict[str, object] = {"rounds": rounds, "spent_share": share}
    for at, what in enumerate(("wall", "processor")):
        pairs = [(one[at], other[at]) for one, other in zip(*found.values(), strict=True)]
        facts[f"{what}_seconds"] = [statistics.median(each) for each in zip(*pairs, strict=True)]
        ratios = sorted(one / other - 1 for one, other in pairs)
        facts[f"{what}_overhead"] = statistics.median(ratios)
        facts[f"{what}_overheads"] = [round(ratio, 4) for ratio in ratios]
    return facts


if __name__ == "__main__":
    main()
