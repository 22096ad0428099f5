"""Temporary directories that are gone with their process, or with the next one's if it was killed.

An open directory is locked as long as its process lives, however that ends. Processes in several
containers may share a disk and do not see each other, but they do see the lock.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "psp-scratch-"
_RANDOM = "[a-z0-9_]{8}"  # of tempfile


class Scratch:
    """An empty directory of this process alone.

    Attributes:
        path: where it is.
    """

    def __init__(self, place: Path | None = None, prefix: str = PREFIX) -> None:
        """Remove what killed processes left, and make it.

        Args:
            place: existing directory to make it in; that of temporary files by default.
            prefix: of its name; what bears it belongs to this class.

        Raises:
            OSError: the system refused.
        """
        place = Path(tempfile.gettempdir() if place is None else place)
        _remove_abandoned(place, re.compile(re.escape(prefix) + _RANDOM))
        self.path, self._lock = _made(place, prefix)

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Path:
        """Return the path."""
        return self.path

    def __exit__(self, *error: object) -> None:
        """Remove it."""
        self.close()


def _made(place: Path, prefix: str) -> tuple[Path, int | None]:
    """Return a new directory and what holds its lock, None on a disk without locks."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        try:
            lock = _locked(path)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process took it for abandoned
        except OSError:
            return path, None
        if path.exists():
            return path, lock
        os.close(lock)


def _locked(path: Path) -> int:
    """Return a descriptor that holds a directory's lock.

    Raises:
        OSError: another process holds it, it is no directory, or there are no locks here.
    """
    try:
        import fcntl
    except ImportError as error:  # Windows has none
        raise OSError("no locks") from error
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _remove_abandoned(place: Path, name: re.Pattern[str]) -> None:
    """Remove directories of this user's that no process holds."""
    with suppress(OSError):
        for entry in os.scandir(place):
            if not name.fullmatch(entry.name):
                continue
            with suppress(OSError):
                lock = _locked(Path(entry.path))
                try:
                    if os.fstat(lock).st_uid == os.getuid():
                        shutil.rmtree(entry.path)
                finally:
                    os.close(lock)
