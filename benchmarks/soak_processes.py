"""Work in processes of its own: on a small disk, with a clock that goes back, killed or not."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone, tzinfo
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from tqdm import tqdm

import common.clock
from common.errors import PspError

REFUSED = 2
"""Exit status of work that ended in one line."""

_INTERRUPTING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}

_YEARS = 3


def in_child(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> int:
    """Do something in a process of its own, after something else there; return its number."""
    # One that is interrupted before it is in its own `try` would clean up after its parent.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTING)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return pid
    status = 1
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        torch.set_num_threads(1)
        # Its own lock is shared with all: one that is killed as it draws would stop them all.
        tqdm.set_lock(RLock())
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        before()
        work()
        status = 0
    except PspError as error:
        status = 4 if "\n" in str(error) else REFUSED
    except BaseException:
        status = 3
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """Return a child's exit status, negative if a signal ended it."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def limit_files(most: int) -> None:
    """Let this process write no file beyond a number of bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[bool]:
    """Mount an empty disk of some bytes on an empty directory; yield whether the system let us."""
    place.mkdir(parents=True, exist_ok=True)
    mount = shutil.which("mount")
    command = [mount or "", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    mounted = bool(mount) and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


def fill(file: Path) -> None:
    """Take whatever is left of a disk."""
    with file.open("wb") as ballast:
        piece = 1 << 20
        while piece >= 4096:
            try:
                os.posix_fallocate(ballast.fileno(), ballast.seek(0, os.SEEK_END), piece)
            except OSError:
                piece //= 2


class _Backwards(datetime):
    """A clock that is set back every time that somebody looks at it."""

    looked = 0

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> _Backwards:
        """Return a time before the last one."""
        cls.looked += 1
        found = datetime.now(timezone.utc) - timedelta(hours=cls.looked)
        return cls.fromtimestamp(found.timestamp(), tz)


def set_clock_back() -> None:
    """Let time go backwards in this process, as far as Python tells it."""
    clock: Any = common.clock
    clock.datetime = _Backwards
    real, looked = time.time, [0]

    def back() -> float:
        looked[0] += 1
        return real() - 3600 * looked[0]

    time.time = back


def set_times(directory: Path, chance: random.Random) -> None:
    """Put all files' times somewhere in the past or the future."""
    for file in directory.rglob("*"):
        moment = time.time() + chance.uniform(-_YEARS, _YEARS) * 365 * 86400
        with suppress(FileNotFoundError):
            os.utime(file, (moment, moment))
