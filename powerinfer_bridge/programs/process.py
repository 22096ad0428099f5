"""Running one program to its end, whatever it does, and leaving nothing of it behind.

No shell is involved: arguments arrive as they are. The program gets its own session, so that all it
starts can be ended with it: at its end, at the time limit, on too much output, and when psp is
interrupted (SIGINT) or told to end (SIGTERM, SIGHUP). Against SIGKILL of psp see `launch`.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from common.errors import EngineError
from powerinfer_bridge.programs import launch

OUTPUT_LIMIT = 16 * 1024 * 1024
"""Bytes that a program may print; the engines print some hundred thousand."""
_TICK = 0.2
"""Seconds between two looks at the clock, at signals, and at a program that shut its output."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_OURS_TO_TAKE = (signal.SIG_DFL, signal.default_int_handler)

Heartbeat = Callable[[float], None]
"""Called about five times a second while a program runs, with the seconds since its start."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A program that has ended.

    Attributes:
        command: the program and its arguments.
        environment: variables that were set for it.
        code: exit code; minus the signal's number if one ended it.
        stdout: what it printed; bytes that are no UTF-8 are replaced.
        stderr: likewise.
        seconds: from its start to its end.
    """

    command: tuple[str, ...]
    environment: dict[str, str]
    code: int
    stdout: str
    stderr: str
    seconds: float


_POINT: dict[str, str | None] = {"LC_ALL": None, "LC_NUMERIC": "C"}
"""PowerInfer's `main` takes the environment's locale (common/console.cpp), and prints `3,85 ms` in
a German one. LC_ALL would win over the second."""


def run_program(
    command: Sequence[str],
    *,
    timeout: float,
    environment: Mapping[str, str | None] | None = None,
    heartbeat: Heartbeat | None = None,
) -> Finished:
    """Run a program in an empty working directory that goes away, with nothing to read.

    Its numbers have a decimal point, whatever the user's locale says.

    Args:
        command: absolute path of the program, and its arguments.
        timeout: longest that it may take, seconds.
        environment: variables to set for it, or with None to take away.
        heartbeat: told that it still runs.

    Raises:
        EngineError: it cannot be started, takes too long or prints too much.
    """
    overrides = dict(environment or {})
    start = time.monotonic()
    # The programs leave log files in the working directory.
    with tempfile.TemporaryDirectory() as directory, _noted_signals() as noted:
        process = start_program(command, overrides, directory)
        watch = _Watch(command[0], process, start, timeout, heartbeat, noted)
        with process:
            try:
                watch.until_the_end()
            finally:
                end_program(process)
    finished = Finished(
        command=tuple(command),
        environment={key: value for key, value in overrides.items() if value is not None},
        code=process.returncode,
        stdout=watch.stdout.decode("utf-8", "replace"),
        stderr=watch.stderr.decode("utf-8", "replace"),
        seconds=time.monotonic() - start,
    )
    raise_unstarted(finished)
    return finished


def raise_unstarted(finished: Finished) -> None:
    """Do nothing if a program that has ended had begun.

    Raises:
        EngineError: the system refused to run it.
    """
    if finished.code == launch.CANNOT_START and finished.stderr.startswith(launch.MARK):
        raise _cannot_start(finished.command, finished.stderr.removeprefix(launch.MARK).strip())


def _cannot_start(command: Sequence[str], reason: str) -> EngineError:
    return EngineError(
        f"{command[0]}: cannot be started ({reason})", "expected a program built for this machine"
    )


def start_program(
    command: Sequence[str],
    environment: Mapping[str, str | None],
    directory: str,
    *,
    stdout: int | IO[bytes] = subprocess.PIPE,
    stderr: int | IO[bytes] = subprocess.PIPE,
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, which dies with psp.

    Args:
        command: absolute path of the program, and its arguments.
        environment: as for `run_program`.
        directory: its working directory.
        stdout: where what it prints goes.
        stderr: likewise.

    Raises:
        EngineError: it cannot be started; what the system refuses to run, `raise_unstarted` tells
            once it has ended.
    """
    merged: dict[str, str | None] = {**os.environ, **_POINT, **environment}
    variables = {key: value for key, value in merged.items() if value is not None}
    launcher = [sys.executable, "-I", "-S", str(Path(launch.__file__)), str(os.getpid())]
    try:
        return subprocess.Popen(
            [*launcher, *command],
            cwd=directory,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:  # ValueError: a NUL in an argument
        raise _cannot_start(command, str(error)) from error


def end_program(process: subprocess.Popen[bytes]) -> None:
    """End a program of `start_program`, and all that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


@dataclass
class _Watch:
    """Reads what a program prints until it ends, or until it must be ended."""

    name: str
    process: subprocess.Popen[bytes]
    start: float
    timeout: float
    heartbeat: Heartbeat | None
    noted: list[int]
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    next_beat: float = 0.0

    def until_the_end(self) -> None:
        """Return once the program has ended and all that it printed is read."""
        with selectors.DefaultSelector() as pipes:
            for pipe, kept in (
                (self.process.stdout, self.stdout),
                (self.process.stderr, self.stderr),
            ):
                assert pipe is not None
                pipes.register(pipe, selectors.EVENT_READ, kept)
            while pipes.get_map() or self.process.poll() is None:
                read = self._read(pipes)
                self._look()
                # What it has started may hold the pipes open after its end.
                if not read and self.process.poll() is not None:
                    return

    def _read(self, pipes: selectors.BaseSelector) -> bool:
        if not pipes.get_map():
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_TICK)
            return False
        ready = pipes.select(_TICK)
        for key, _ in ready:
            chunk = os.read(key.fd, 65536)
            key.data.extend(chunk)
            if not chunk:
                pipes.unregister(key.fileobj)
        return bool(ready)

    def _look(self) -> None:
        elapsed = time.monotonic() - self.start
        if self.noted:
            _obey(self.noted[0])
        if len(self.stdout) + len(self.stderr) > OUTPUT_LIMIT:
            size = OUTPUT_LIMIT // 1024**2
            raise EngineError(
                f"{self.name}: printed more than {size} MiB",
                "run it by hand to see what it prints",
            )
        if elapsed > self.timeout and self.process.poll() is None:
            raise EngineError(
                f"{self.name}: no end after {self.timeout:g} s{last_words(self.stderr)}",
                "run it by hand to see why",
            )
        if self.heartbeat is not None and elapsed >= self.next_beat:
            self.next_beat = elapsed + _TICK
            self.heartbeat(elapsed)


def last_words(stderr: bytes | bytearray | str) -> str:
    """Return the last line that is not empty, to follow a message; nothing if there is none."""
    text = stderr if isinstance(stderr, str) else stderr.decode("utf-8", "replace")
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    return f": {last}" if last else ""


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Note signals that would end psp at once, instead of obeying them.

    An exception out of a handler could come between a program's start and the moment it is known;
    a note cannot. Handlers can be set in the main thread only, where Python runs them; those that
    are not at their defaults (`nohup`) are left alone.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) in _OURS_TO_TAKE:
                before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if noted:  # also one that came after the last look, or beside another error
            _obey(noted[0])


def _obey(number: int) -> None:
    """Raise what lets psp clean up and end as the signal asks."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
