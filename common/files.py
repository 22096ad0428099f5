"""Files that are either whole or absent.

A file is written under a temporary name in its own directory, synced to disk and renamed. Whatever
goes wrong before the rename leaves nothing under the final name; a temporary file that a killed
process left behind is overwritten by the next attempt.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import OutputError, PspError, reason

_REMEDIES = {
    errno.ENOSPC: "free some space or choose another --out",
    errno.EDQUOT: "free some space or choose another --out",
    errno.EFBIG: "raise the file size limit (ulimit -f) or choose another --out",
    errno.EACCES: "choose a directory that you may write to",
    errno.EPERM: "choose a directory that you may write to",
    errno.EROFS: "choose a directory that you may write to",
}

LARGEST_DOCUMENT = 64 << 20
"""Bytes of a document that is read whole; the largest published tokenizer.json has 35 MB."""

_MOST_PARSED = 384 << 20
"""Bytes of memory that values of a document may take; those of a tokenizer.json of 35 MB with
580,000 merges take 180 MB."""

_LFS = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
"""A pointer is a few short lines (git-lfs docs/spec.md: less than 1024 bytes)."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes the file `path` if the block ends without an exception.

    Args:
        path: final name; its directory is made if need be, and goes with a failure if it is empty
            then. A link stays, its target is replaced.

    Yields:
        The temporary path to write to, in the same directory.

    Raises:
        OutputError: the operating system refused a write, a sync or the rename.
    """
    part, target = part_of(path)
    with _cleared(path, part):
        yield part
        _sync(part)
        os.replace(part, target)
        _sync(target.parent)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces `path` if the block ends without an exception.

    Args:
        path: as for `atomic_path`.

    Yields:
        An empty directory beside it.

    Raises:
        OutputError: the operating system refused a step.
    """
    part, target = part_of(path)
    with _cleared(path, part):
        if part.is_dir():
            shutil.rmtree(part)
        part.mkdir()
        yield part
        remove_output(target)
        os.rename(part, target)
        _sync(target.parent)


def put_in_place(made: Path, path: Path) -> None:
    """Let a whole file that lies on the same disk become the file `path`.

    Raises:
        OutputError: the operating system refused.
    """
    try:
        os.replace(made, path)
        _sync(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def flush_to_disk(path: Path) -> None:
    """Wait until a file that was written is on disk.

    Raises:
        OutputError: the operating system refused.
    """
    try:
        _sync(path)
    except OSError as error:
        raise write_error(path, error) from error


def part_of(path: Path) -> tuple[Path, Path]:
    """Return the temporary name of an output, and the one that it gets.

    A link is followed, so that what is behind it is replaced as atomically as anything else.
    """
    target = Path(os.path.realpath(path)) if os.path.islink(path) else path
    return target.with_name(f".{target.name}.part"), target


@contextmanager
def _cleared(path: Path, part: Path) -> Iterator[None]:
    """Make the directory of `part`; whatever goes wrong, remove both if they were made for it.

    What the system refuses becomes one line.
    """
    made: list[Path] = []
    try:
        made += [each for each in (part.parent, *part.parent.parents) if not each.exists()]
        part.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        # Where the system refused the path itself, it refuses to remove it too.
        with suppress(OSError):
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        for each in made:
            with suppress(OSError):  # it holds something else by now
                each.rmdir()
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def write_error(path: Path, error: OSError) -> OutputError:
    """Say in one line what the system refused and what to do about it."""
    remedy = _REMEDIES.get(error.errno or 0, "check the path and try again")
    return OutputError(f"cannot write {path}: {error.strerror or error}", remedy)


@contextmanager
def refused_writes(path: Path) -> Iterator[None]:
    """Say in one line that libraries found no room for what they write below `path`.

    Raises:
        OutputError: the disk or the quota is full, a file may not grow, or nothing may be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise write_error(path, error) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_path(path) as part:
        part.write_bytes(data)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write `document` as indented UTF-8 JSON, whole or not at all."""
    write_bytes(path, json_bytes(document))


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """Return `document` as indented UTF-8 JSON."""
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def read_whole(
    path: Path,
    error: type[PspError],
    remedy: str,
    *,
    limit: int = LARGEST_DOCUMENT,
    piped: bool = False,
) -> bytes:
    """Read a document that is held in memory: never one without end, never a huge one.

    Args:
        path: a plain file, or a link to one.
        error: what is raised.
        remedy: in which its line ends.
        limit: bytes that it may have.
        piped: what another program writes into a pipe is waited for and read too.

    Raises:
        error: missing, unreadable, no plain file, or larger than `limit`.
    """
    with opened(path, error, remedy, piped=piped) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        most = f"{limit >> 20} MiB" if limit >> 20 else f"{limit >> 10} KiB"
        raise error(f"{path}: more than {most}, which no such file has", remedy)
    return data


@contextmanager
def opened(
    path: Path, error: type[PspError], remedy: str, *, piped: bool = False
) -> Iterator[BinaryIO]:
    """Open a plain file to read its bytes, and say in one line what the system refuses.

    Args:
        path: as for `read_whole`, like the others.
        error: likewise.
        remedy: likewise.
        piped: likewise.

    Raises:
        error: missing, no plain file, or unreadable.
    """
    try:
        with open(path, "rb", opener=None if piped else _at_once) as file:
            if not piped and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise error(f"{path}: no plain file", remedy)
            yield file
    except (OSError, ValueError) as problem:  # a NUL in its name is a ValueError
        said = getattr(problem, "strerror", None) or problem
        raise error(f"{path}: {said}", remedy) from problem


def refuse_special(path: Path, error: type[PspError], remedy: str) -> None:
    """Refuse a pipe or a device in a file's place, which a library would wait for or not end.

    Raises:
        error: it is one; of a directory and what cannot be seen whoever reads it says why.
    """
    with suppress(OSError, ValueError):
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise error(f"{path}: no plain file", remedy)


def why_unreadable(path: Path, error: BaseException) -> str:
    """Return what the system says of opening a file, or what a library said that could not read it.

    safetensors calls a file missing whatever keeps it from opening it.
    """
    try:
        with path.open("rb"):
            return reason(error)
    except OSError as own:
        return own.strerror or reason(own)


def _at_once(path: str, flags: int) -> int:
    """Open a file without waiting for whoever writes into it, were it a named pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_json(path: Path, error: type[PspError], remedy: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        error: as `read_whole`, or the file is not JSON or not an object; the line ends in
            `remedy`.
    """
    data = read_whole(path, error, remedy)
    if _parsed_bytes(data) > _MOST_PARSED:
        raise error(f"{path}: holds more values than any such file has", remedy)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid JSON ({problem})", remedy) from problem
    if not isinstance(document, dict):
        raise error(f"{path}: expected a JSON object, found {type(document).__name__}", remedy)
    return document


def _parsed_bytes(data: bytes) -> int:
    """Return about what a JSON text takes in memory once it is read: at worst 80 times its size."""
    pieces = ((b"{", 232), (b"[", 64), (b'"', 30), (b",", 40))  # bytes of an object, a list, ...
    return len(data) + sum(size * data.count(sign) for sign, size in pieces)


def refuse_pointer(file: Path, error: type[PspError]) -> None:
    """Refuse what Git left in a file's place when Git LFS was not installed.

    Raises:
        error: the file is such a pointer.
    """
    try:
        if not file.is_file() or file.stat().st_size > _POINTER_BYTES:
            return
        begin = file.read_bytes()[: len(_LFS)]
    except OSError:
        return  # whoever reads it says why it cannot be read
    if begin == _LFS:
        raise error(
            f"{file}: is a Git LFS pointer, the file itself was not fetched",
            "install git-lfs and run 'git lfs pull' in that directory",
        )


def sha256(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def refuse_existing(
    path: Path,
    *,
    force: bool,
    marker: str | None = None,
    resumable: bool = False,
    option: str = "--out",
) -> None:
    """Make sure that `path` may be written.

    Args:
        path: file or directory about to be made.
        force: the user accepts that it is replaced.
        marker: for directories: a file that every one of the kind holds. One without it was made by
            somebody else and is never replaced.
        resumable: the command could also go on with what is there; the message says so.
        option: by which a user chose the path, for remedies.

    Raises:
        OutputError: the output exists and may not be replaced.
    """
    if not os.path.lexists(path) or _only_leftovers(path):
        return
    if not force:
        resume = "--resume to go on with it, " if resumable else ""
        raise OutputError(
            f"{path} exists", f"pass {resume}--force to replace it or another {option}"
        )
    if marker and path.is_dir() and not (path / marker).exists():
        raise OutputError(f"{path} was not made by this command", f"choose another {option}")


def remove_output(path: Path) -> None:
    """Remove what stands where an output is about to be made; a link goes, its target stays.

    A directory is renamed before it is emptied, so that a process killed meanwhile leaves none
    that looks like the output; the next call removes what is left of it.

    Raises:
        OutputError: the system refused.
    """
    aside = path.with_name(f".{path.name}.old")
    try:
        if os.path.isdir(aside):
            shutil.rmtree(aside)
        if os.path.isdir(path) and not path.is_symlink():
            os.rename(path, aside)
            shutil.rmtree(aside)
        elif os.path.lexists(path):
            path.unlink()
    except OSError as error:
        raise write_error(path, error) from error


def _only_leftovers(path: Path) -> bool:
    """Whether a directory holds nothing but what a killed run left behind, at whatever depth."""
    return (path.is_dir() and not path.is_symlink()) and all(
        (entry.name.startswith(".") and entry.suffix == ".part") or _only_leftovers(entry)
        for entry in path.iterdir()
    )
