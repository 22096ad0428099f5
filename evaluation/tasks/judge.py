"""Programs that a model wrote: whether they run to their end.

Each runs in a Python of its own, in an empty directory of its own, without the environment of this
process, under limits, and is killed with its group when its time is up. That keeps clumsy programs
from doing harm. It is **no sandbox**: a program may read and write what this user may, and use the
network. Run what you do not trust in a container or a virtual machine.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.scratch import Scratch

Verdict = Literal["passed", "failed", "out of time"]

_GIB = 1 << 30

_LIMITED = """
import os, resource, signal, sys
program, seconds, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for name, most in (
    ("RLIMIT_CPU", seconds + 1), ("RLIMIT_AS", memory), ("RLIMIT_CORE", 0),
    ("RLIMIT_FSIZE", 1 << 24), ("RLIMIT_NOFILE", 64), ("RLIMIT_NPROC", 16),
):
    if hasattr(resource, name):
        kind = getattr(resource, name)
        held = resource.getrlimit(kind)[1]
        most = most if held == resource.RLIM_INFINITY else min(most, held)
        soon = most - 1 if name == "RLIMIT_CPU" else most  # a signal that tells, then the end
        resource.setrlimit(kind, (soon, most))
signal.alarm(seconds + 2)
os.execv(sys.executable, [sys.executable, "-I", "-B", "-X", "utf8", program])
"""
"""Limits itself, and becomes the program. The alarm outlives this process's parent."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: of its CPU, and by the clock.
        memory: bytes of its address space.
    """

    seconds: int = 10
    memory: int = 2 * _GIB


def judge(
    programs: Sequence[str], *, limits: Limits | None = None, workers: int | None = None
) -> list[Verdict]:
    """Run programs, several at once, and say which came to their end.

    A program passes if its last line was reached and it ended with code 0: `sys.exit(0)` on the
    way is no pass. What it prints is thrown away, and nothing can be typed to it.

    Args:
        programs: each the text of a program in Python, tests and all.
        limits: the usual ones by default.
        workers: programs at once; as many as this process has cores by default.
    """
    limits = limits or Limits()
    workers = workers or len(os.sched_getaffinity(0))
    with Scratch(prefix="psp-programs-") as place, ThreadPoolExecutor(workers) as pool:
        runs = [
            pool.submit(_run, program, place / str(number), limits)
            for number, program in enumerate(programs)
        ]
        return [run.result() for run in runs]


def _run(program: str, directory: Path, limits: Limits) -> Verdict:
    directory.mkdir()
    file, nonce = directory / "program.py", secrets.token_hex(16)
    reading, writing = os.pipe()
    try:
        try:
            file.write_text(f"{program}\n__import__('os').write({writing}, b'{nonce}')\n", "utf-8")
        except UnicodeEncodeError:  # half a surrogate pair is no program
            return "failed"
        code = _ended(file, writing, limits)
        os.set_blocking(reading, False)
        said = b""
        with suppress(BlockingIOError):
            said = os.read(reading, len(nonce) + 1)
    finally:
        os.close(reading)
        os.close(writing)
    if code is None:
        return "out of time"
    return "passed" if code == 0 and said.decode(errors="replace") == nonce else "failed"


def _ended(file: Path, writing: int, limits: Limits) -> int | None:
    """Run a program, kill what is left of its group, and return its code; None if time ran out."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _LIMITED, file.name]
        + [str(number) for number in (limits.seconds, limits.memory)],
        cwd=file.parent,
        env={"OPENBLAS_NUM_THREADS": "1"},  # else NumPy reserves memory by the core
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(writing,),
        start_new_session=True,
    )
    try:
        code = process.wait(limits.seconds + 1)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None if code in (-signal.SIGXCPU, -signal.SIGALRM) else code
