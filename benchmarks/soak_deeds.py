"""What `benchmarks.soak` does to commands, and what it holds them to."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from benchmarks.soak_processes import (
    REFUSED,
    ended,
    fill,
    in_child,
    limit_files,
    set_clock_back,
    set_times,
    small_disk,
)
from benchmarks.soak_writer import Files, Writer, everything
from common.errors import PspError
from common.provenance import PROVENANCE
from common.sealed import SEAL

_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FLIPS = 20
"""Bits flipped in a round."""

_BALLAST = ".ballast"

_LATER, _EARLIER = 1.03, 0.9
"""What the time in which something is to happen is multiplied by, when it came in time or not."""


class Soak:
    """Counts, and what went wrong."""

    def __init__(self, every: list[Writer], chance: random.Random, *, mounts: bool = True) -> None:
        """Make the unbroken results, and the old ones.

        Args:
            every: the commands.
            chance: of what happens when.
            mounts: a disk that fills may be a mounted one; else files have a largest size.
        """
        self._every, self._chance, self._mounts = every, chance, mounts
        self.counts, self.wrong = Counter[str](), list[str]()
        self._old = dict[str, tuple[Files, Files]]()
        self._whole, self._seconds = dict[str, Files](), dict[str, float]()
        for each in every:
            shutil.rmtree(each.place, ignore_errors=True)
            if each.old is not None:
                assert ended(in_child(each.old)) == 0, each.name
                self._old[each.name] = everything(each.place), each.seen(each.place)
            begun = time.monotonic()
            assert ended(in_child(each.write)) == 0, each.name
            self._seconds[each.name] = time.monotonic() - begun
            self._whole[each.name] = each.seen(each.place)
            assert self._whole[each.name], each.name

    def _choose(self) -> Writer:
        """Choose a command, a slow one less often."""
        weights = [1 / max(1.0, self._seconds[each.name]) for each in self._every]
        return self._chance.choices(self._every, weights)[0]

    def _prepare(self, each: Writer) -> None:
        if not each.place.is_mount():
            shutil.rmtree(each.place, ignore_errors=True)
        files, _ = self._old.get(each.name, ({}, {}))
        for name, data in files.items():
            file = each.place / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)

    def _fail(self, what: str) -> None:
        self.wrong.append(what)
        print(what, file=sys.stderr)

    def _moment(self, each: Writer) -> float:
        return self._chance.uniform(0, self._seconds[each.name])

    def _look(self, each: Writer, where: str) -> None:
        """Make sure that the old or the new result is there, whole."""
        each.look()
        if each.name not in self._old:
            return
        files, old = self._old[each.name]
        if each.kept is not None:
            assert each.in_place is not None
            inside = f"{each.in_place.name}/"
            before = {n.removeprefix(inside): f for n, f in files.items() if n.startswith(inside)}
            if everything(each.kept) != before:
                self._fail(f"{where}: what is kept is not the old result")
            return
        if each.seen(each.place) not in (old, self._whole[each.name]):
            self._fail(f"{where}: neither the old nor the new result")
        if each.read is not None:
            try:
                each.read()
            except PspError as error:
                self._fail(f"{where}: what is there cannot be read ({error})")

    def _go_on(self, each: Writer, where: str, *, backwards: bool = False) -> None:
        """Do what a user does next, and make sure that it ends as if nothing had been."""
        before = set_clock_back if backwards else _nothing
        if (status := ended(in_child(each.go_on, before))) != 0:
            self._fail(f"{where}: did not go on (exit {status})")
        elif each.seen(each.place) != self._whole[each.name]:
            self._fail(f"{where}: went on to something else")
        left = [p.name for p in each.place.rglob("*") if p.name.startswith(".")]
        if left:
            self._fail(f"{where}: left {', '.join(left)}")

    def kill(self, *, backwards: bool = False) -> None:
        """Kill a command at a random instant, look at what is there, and go on."""
        each = self._choose()
        self._prepare(each)
        if backwards:
            set_times(each.place, self._chance)
        pid = in_child(each.write, set_clock_back if backwards else _nothing)
        moment = self._moment(each)
        time.sleep(moment)
        with suppress(ProcessLookupError):
            os.kill(pid, self._chance.choice(_SIGNALS))
        status = ended(pid)
        self.counts["killed" if status else "ended before"] += 1
        # A machine that other work leaves is faster than when it was measured.
        self._seconds[each.name] *= _LATER if status else _EARLIER
        self.counts[f"killed: {each.name}"] += status != 0
        where = f"{each.name}, killed after {moment:.3f} s"
        if backwards:
            self.counts["clocks set back"] += 1
            set_times(each.place, self._chance)
            where += ", clock set back"
        self._look(each, where)
        self._go_on(each, where, backwards=backwards)

    def set_back(self) -> None:
        """Do the same while clocks go back and files are of the past and the future."""
        self.kill(backwards=True)

    def collide(self) -> None:
        """Let two processes write one output."""
        each = self._choose()
        self._prepare(each)
        first = in_child(each.write)
        time.sleep(self._moment(each) / 2)
        second = in_child(each.write)
        statuses = sorted((ended(first), ended(second)))
        self.counts["collisions"] += 1
        self.counts["collisions: one refused"] += statuses == [0, REFUSED]
        if statuses not in ([0, 0], [0, REFUSED]):
            self._fail(f"{each.name}, two at once: ended with {statuses}")
        if each.seen(each.place) != self._whole[each.name]:
            self._fail(f"{each.name}, two at once: damaged")

    def fill(self) -> None:
        """Let the disk be full at some moment, or no file be as large as it must, and free it."""
        each = self._choose()
        shutil.rmtree(each.place, ignore_errors=True)
        sizes = [len(data) for data in self._whole[each.name].values()]
        files, _ = self._old.get(each.name, ({}, {}))
        room = 16 * sum(sizes) + 4 * sum(map(len, files.values())) + (64 << 20)
        moment = self._moment(each)
        with ExitStack() as stack:
            mounted = self._mounts and stack.enter_context(small_disk(each.place, room))
            self._prepare(each)
            if mounted:
                pid = in_child(each.write)
                time.sleep(moment)
                fill(each.place / _BALLAST)
                where = f"{each.name}, disk full after {moment:.3f} s"
            else:
                most = self._chance.randrange(max(sizes))
                pid = in_child(each.write, partial(limit_files, most))
                where = f"{each.name}, files of {most} bytes at most"
            status = ended(pid)
            self.counts["disks filled"] += 1
            self.counts["disks filled: one line"] += status == REFUSED
            if status not in (0, REFUSED):
                self._fail(f"{where}: ended with {status}")
            if parts := [path.name for path in each.place.rglob(".*.part")]:
                self._fail(f"{where}: left {', '.join(parts)}")
            (each.place / _BALLAST).unlink(missing_ok=True)
            self._look(each, where)
            self._go_on(each, where)

    def flip(self) -> None:
        """Flip bits of a whole result, one at a time."""
        each = self._chance.choice([each for each in self._every if each.read is not None])
        assert each.read is not None
        self._prepare(each)
        assert ended(in_child(each.write)) == 0, each.name
        found = sorted(path for path in each.place.rglob("*") if path.is_file())
        told = [path for path in found if path.name != PROVENANCE]
        known = [path for path in told if path.name in each.vouched] if each.vouched else told
        for _ in range(_FLIPS):
            file = self._chance.choice(known)
            whole = file.read_bytes()
            at = self._chance.randrange(len(whole))
            damaged = bytearray(whole)
            damaged[at] ^= 1 << self._chance.randrange(8)
            file.write_bytes(damaged)
            self.counts["bits flipped"] += 1
            try:
                each.read()
                if _harmless(file, whole, bytes(damaged), at):
                    self.counts["bits flipped: of a byte that nobody uses"] += 1
                else:
                    self._fail(f"{each.name}: {file.name}, byte {at}: not noticed")
            except PspError:
                self.counts["bits flipped: noticed"] += 1
            file.write_bytes(whole)


def _nothing() -> None:
    """Be the default of what is done before."""


def _harmless(file: Path, whole: bytes, damaged: bytes, at: int) -> bool:
    """Whether a document has the same values still, in other letters, or a damaged seal's name.

    White space, 1E-05 for 1e-05, a digit beyond a float's precision, an escape in capitals.
    """
    if file.suffix not in (".json", ".jsonl"):
        return False
    near = whole[max(0, at - len(SEAL) - 2) : at + len(SEAL) + 2]
    return SEAL.encode() in near or _values(file, damaged) == _values(file, whole)


def _values(file: Path, text: bytes) -> list[object]:
    """Return what a document holds, or each of a journal's lines."""
    parts = text.splitlines() if file.suffix == ".jsonl" else [text]
    return [json.loads(part) for part in parts]
