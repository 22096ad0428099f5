"""Processes to be killed: forks of this one and programs that never end, and whether they run."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

SLEEPER = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
pathlib.Path(sys.argv[1] + '.new').write_text(f'{os.getpid()} {child.pid}')
os.rename(sys.argv[1] + '.new', sys.argv[1])
"""
"""Starts a program of its own and writes both numbers down."""
FOREVER = SLEEPER + "time.sleep(600)"


def forked(work: Callable[[], object], prints_to: Path | None = None) -> int:
    """Work in a forked process, which has everything imported already; return its id.

    It exits with 0, with 1 and a traceback where the work raises, or as the work exits.
    """
    with warnings.catch_warnings():
        # From Python 3.12 on: of the parent's threads, none of which the child needs.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        gc.freeze()  # a collection would write to, and so copy, all memory of the parent's
        # tqdm's own lock is shared with the parent: who is killed while holding it keeps it.
        tqdm.set_lock(threading.RLock())
        if prints_to is not None:
            sys.stdout = sys.stderr = prints_to.open("w", buffering=1)
            for standard in (1, 2):
                os.dup2(sys.stdout.fileno(), standard)
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def ending(child: int) -> int:
    """Wait for a process; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(child: int, reached: Callable[[], bool], delay: float = 0) -> int:
    """Kill a process some seconds after it has reached something; return how it ended."""
    until = time.monotonic() + 120
    try:
        while not reached() and not os.waitid(
            os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            assert time.monotonic() < until
            time.sleep(0.001)
        time.sleep(delay)
    finally:
        os.kill(child, signal.SIGKILL)  # nothing to who has ended: that waits to be asked for
    return ending(child)


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
