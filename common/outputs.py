"""Directories that are replaced whole: the old one stays until the new one is complete."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.files import refuse_existing, remove_output, write_error
from common.lock import locked

_AT_FDCWD, _EXCHANGE = -100, 2
"""Of Linux's renameat2(2)."""


@contextmanager
def written_whole(
    out: Path,
    *,
    resume: bool,
    force: bool,
    marker: str,
    begun_by: str | None = None,
    complete: Callable[[Path], bool] = lambda work: True,
) -> Iterator[Path]:
    """Write a directory in its place, or beside an old one that it replaces at the end.

    Nobody else writes it meanwhile. What a killed or failed run with `force` has made so far stays
    beside the old directory, as `.NAME.new`, and `resume` goes on with it.

    Args:
        out: the directory.
        resume: go on with what is there.
        force: an old one may be replaced.
        marker: a file that every directory of the kind holds.
        begun_by: the first one that is written; None is `marker`.
        complete: whether the new one may stand for the old one.

    Yields:
        Where to write.

    Raises:
        OutputError: another process is at work there, it exists and may not be replaced, or the
            system refused.
    """
    with locked(out):
        new = _beside(out, "new")
        recover(out)
        if resume and ((new / marker).exists() or (new / (begun_by or marker)).exists()):
            work = new
        else:
            begun = (out / marker).exists() or (out / (begun_by or marker)).exists()
            if not resume or not begun:
                refuse_existing(out, force=force, marker=marker, resumable=True)
            work = new if force and not resume and begun else out
        yield work
        if work is not out and complete(work):
            exchange(work, out)
        elif work is out:
            remove_output(new)  # of a run that was given up
        remove_output(_beside(out, "changed"))  # of one that was killed


@contextmanager
def changed_whole(path: Path) -> Iterator[Path]:
    """Change files of a directory all at once.

    Yields:
        A copy to change, which takes the directory's place if the block ends without an exception.

    Raises:
        OutputError: the system refused.
    """
    recover(path)
    copy = _beside(path, "changed")
    try:
        if copy.exists():
            shutil.rmtree(copy)
        shutil.copytree(path, copy)
    except OSError as error:
        raise write_error(path, error) from error
    yield copy
    exchange(copy, path)


def exchange(new: Path, path: Path) -> None:
    """Put a complete directory in the place of another one, which is removed.

    Raises:
        OutputError: the system refused.
    """
    target = Path(os.path.realpath(path)) if os.path.islink(path) else path
    try:
        if not os.path.lexists(target):
            os.rename(new, target)
        elif not _exchanged(new, target):
            aside = _beside(target, "aside")
            os.rename(target, aside)
            os.rename(new, target)
            shutil.rmtree(aside)
        else:
            remove_output(new)
    except OSError as error:
        raise write_error(path, error) from error


def in_place(work: Path) -> Path:
    """Return where what is written beside an old directory is going to be, for messages."""
    name = work.name
    return work.with_name(name[1:-4]) if name.startswith(".") and name.endswith(".new") else work


def recover(path: Path) -> None:
    """Put a directory back that a killed `exchange` has set aside, on systems that need two steps.

    Raises:
        OutputError: the system refused.
    """
    aside = _beside(path, "aside")
    if not aside.exists():
        return
    complete = (_beside(path, name) for name in ("changed", "new"))
    new = next((each for each in complete if each.exists()), None)
    try:
        if os.path.lexists(path):
            shutil.rmtree(aside)
        elif new is not None:
            os.rename(new, path)
            shutil.rmtree(aside)
        else:
            os.rename(aside, path)
    except OSError as error:
        raise write_error(path, error) from error


def set_aside(out: Path) -> None:
    """Keep an old directory beside a new one, for commands that must write in its place.

    It becomes `.NAME.kept`. If there is one already, what is in its place is what a killed run has
    made so far, and goes.

    Raises:
        OutputError: the system refused.
    """
    kept = kept_beside(out)
    if kept.exists():
        remove_output(out)
        return
    try:
        if os.path.isdir(out) and not os.path.islink(out):
            os.rename(out, kept)
        else:
            remove_output(out)
    except OSError as error:
        raise write_error(out, error) from error


def drop_kept(out: Path) -> None:
    """Remove what `set_aside` kept and a killed `changed_whole` left, once the new one is complete.

    Raises:
        OutputError: the system refused.
    """
    remove_output(kept_beside(out))
    remove_output(_beside(out, "changed"))


def kept_beside(out: Path) -> Path:
    """Return where `set_aside` keeps an old directory."""
    return _beside(out, "kept")


def _beside(path: Path, what: str) -> Path:
    target = Path(os.path.realpath(path)) if os.path.islink(path) else path
    return target.with_name(f".{target.name}.{what}")


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; return whether the system can."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(one), os.fsencode(other)
        found = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE)
        return bool(found == 0)
    return False
