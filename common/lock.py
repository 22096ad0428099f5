"""Outputs that one process alone writes.

The lock is a file beside the output, `.NAME.lock`, that is locked as long as its process lives,
however that ends, and says who holds it. The output itself may be replaced meanwhile.

`flock` on Linux holds between processes of one machine, in several containers too, and on NFS
between machines as well, where the server's lock manager runs; on a disk without locks, and on
Windows, there is none, and two writers are not told of each other.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.clock import now
from common.errors import OutputError, PspError

_held: set[str] = set()
"""Locks of this process."""


@contextmanager
def locked(out: Path, option: str = "--out") -> Iterator[None]:
    """Hold the lock of an output, a file or a directory that need not be there yet.

    Args:
        out: the output.
        option: by which a user chose it, for remedies.

    Raises:
        OutputError: another process holds it, or the system refused.
    """
    file = lock_file(out)
    made = [each for each in (file.parent, *file.parent.parents) if not each.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _taken(file)
    except OSError as error:
        raise OutputError(
            f"cannot write {out}: {error.strerror or error}", f"choose another {option}"
        ) from error
    if descriptor is None:
        raise OutputError(
            f"{out}: is being written by {_told(file)}", f"wait for it, or choose another {option}"
        )
    _held.add(os.path.abspath(file))
    try:
        yield
    finally:
        _held.discard(os.path.abspath(file))
        with suppress(OSError):
            file.unlink()
        if descriptor >= 0:
            with suppress(OSError):  # a network's disk that is gone
                os.close(descriptor)
        for each in made:
            with suppress(OSError):  # it holds something by now
                each.rmdir()


def writer_of(out: Path) -> str | None:
    """Return who writes an output at this moment, None if nobody does as far as can be told."""
    file = lock_file(out)
    if os.path.abspath(file) in _held or not file.is_file():
        return None
    try:
        import fcntl

        with file.open("rb") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _told(file)
    except (ImportError, OSError):
        pass
    return None


def refuse_written(out: Path, error: type[PspError]) -> None:
    """Do nothing if nobody writes what was found unfinished.

    Raises:
        error: somebody does, by name.
    """
    if (writer := writer_of(out)) is not None:
        raise error(f"{out}: is being written by {writer}", "wait until that has ended")


def lock_file(out: Path) -> Path:
    """Return where the lock of an output is; links lead to the lock of what is behind them."""
    target = Path(os.path.realpath(out)) if os.path.islink(out) else Path(os.path.abspath(out))
    return target.with_name(f".{target.name}.lock")


def _taken(file: Path) -> int | None:
    """Return an open descriptor that holds the lock, -1 where there are none, None if held."""
    try:
        import fcntl
    except ImportError:  # Windows has none
        return -1
    while True:
        # Nothing of somebody else's is written to, were the lock a link to it.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(file, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # a disk without locks
            return descriptor
        # Whoever held it before may have removed the file between its opening and its locking.
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                break
        os.close(descriptor)
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    return descriptor


def _told(file: Path) -> str:
    try:
        holder = json.loads(file.read_bytes())
        return f"pid {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
