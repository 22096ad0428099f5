"""Directories that one process alone writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import OutputError


@contextmanager
def locked(out: Path, option: str = "--out") -> Iterator[None]:
    """Hold a lock on a directory, which ends with the process; made if it is not there.

    Args:
        out: the directory.
        option: by which a user chose it, for remedies.

    Raises:
        OutputError: another process holds it, or the system refused.
    """
    try:
        import fcntl
    except ImportError:  # Windows has none
        out.mkdir(parents=True, exist_ok=True)
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise OutputError(
            f"{out}: {error.strerror or error}", f"choose another {option}"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{out}: another run is at work there", f"wait for it, or choose another {option}"
            ) from error
        yield
    finally:
        os.close(descriptor)
