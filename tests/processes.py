"""Programs that never end, and whether they still run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

SLEEPER = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
pathlib.Path(sys.argv[1] + '.new').write_text(f'{os.getpid()} {child.pid}')
os.rename(sys.argv[1] + '.new', sys.argv[1])
"""
"""Starts a program of its own and writes both numbers down."""
FOREVER = SLEEPER + "time.sleep(600)"


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and nobody asked for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def started(file: Path) -> list[int]:
    wait_for(file.exists)
    return [int(word) for word in file.read_text().split()]


def all_dead(pids: list[int]) -> Callable[[], bool]:
    return lambda: not any(alive(pid) for pid in pids)


def an_hour_after(file: Path) -> Callable[[], float]:
    """Return a clock that jumps ahead once it has been read while a file existed."""
    clock, seen = time.monotonic, [False]

    def read() -> float:
        seen.append(file.exists())
        return clock() + 3600 * seen[-2]

    return read
