"""A prefix in an object store, through fsspec and whichever library speaks its protocol.

Files are written to a scratch directory of this machine's and uploaded whole; what is read is
fetched there and mapped. Credentials, endpoints and retries are the library's own.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar
from uuid import uuid4

from common.errors import OutputError, PspError, TraceError, reason
from common.files import LARGEST_DOCUMENT
from common.scratch import Scratch
from common.units import decimal_size
from common.urls import Url
from predictor.traces.place import PARTS, Place

_SECONDS = 10
"""That an object store has to answer before the start; libraries retry for minutes."""

_EXTRAS = {"s3": "psp[s3]", "s3a": "psp[s3]", "gs": "gcsfs", "gcs": "gcsfs"}
_CHECK = "check bucket, network, and endpoint and credentials in the library's environment"
_HOLDER = re.compile(r"//[^/@\s]*@")
"""Name and password in an address."""


Answer = TypeVar("Answer")


class Objects(Place):
    """A prefix in an object store."""

    where: Url

    def __init__(self, where: Url) -> None:
        """Name it; nothing is asked yet."""
        self.where = where

    def at(self, name: str) -> Url:
        """See `Place`, like the others."""
        return Url(f"{self.where}/{name}")

    def parts(self) -> Objects:
        """Return a place for what workers of this run write."""
        return Objects(self.at(f"{PARTS}{uuid4().hex[:8]}"))

    def ask(self, *, write: bool) -> None:
        """Make sure that the object store answers.

        Args:
            write: that it lets objects be written and removed too.

        Raises:
            OutputError: it does not let this process write.
            TraceError: it does not let it read.
        """
        error = OutputError if write else TraceError
        with self._asked(str(self.where), error):
            _within(_SECONDS, self._try_write if write else self._files().exists, self._key())

    def _try_write(self, key: str) -> None:
        files, probe = self._files(), f"{key}/{PARTS}{uuid4().hex}"
        files.pipe_file(probe, b"psp")
        files.rm_file(probe)

    def has(self, name: str) -> bool:
        """Whether there is an object."""
        with self._asked(self.at(name), TraceError):
            self._files().invalidate_cache()
            return bool(self._files().exists(self._key(name)))

    def sizes(self) -> dict[str, int]:
        """Return the name of every object, and its bytes."""
        with self._asked(self.where, TraceError):
            files, root = self._files(), self._key()
            files.invalidate_cache()
            found = files.find(root, detail=True)
            start = len(root) + 1
            return {path[start:]: int(told["size"]) for path, told in found.items()}

    def largest(self, starts: Iterable[str]) -> int:
        """Return the most bytes of objects together whose names begin alike, of some beginnings."""
        sizes = self.sizes().items()
        return max(sum(size for name, size in sizes if name.startswith(each)) for each in starts)

    @contextmanager
    def writing(self, *names: str, new: bool = False) -> Iterator[list[Path]]:
        """Write to a scratch directory and upload, several at once as the library does."""
        with self._scratch() as place:
            parts = [place / name.replace("/", "-") for name in names]
            yield parts
            self._put(dict(zip(names, parts, strict=True)), new=new)

    @contextmanager
    def reading(self, *names: str) -> Iterator[list[Path]]:
        """Fetch objects to a scratch directory, where they lie until the block ends."""
        with self._scratch() as place:
            paths = [place / name for name in names]
            for path in paths:
                path.parent.mkdir(exist_ok=True)
            with self._asked(self.where, TraceError):
                keys = [self._key(name) for name in names]
                self._files().get(keys, [str(path) for path in paths])
            with self._named(place):
                yield paths

    @contextmanager
    def document(self, name: str) -> Iterator[Path]:
        """Fetch an object, or as much of it as is enough to refuse it."""
        with self._scratch() as place, self._asked(self.at(name), TraceError):
            self._fetch_document(place, name)
            with self._named(place):
                yield place / name

    @contextmanager
    def changing(self, name: str) -> Iterator[Path]:
        """Fetch an object, if there is one, and upload what has become of it."""
        with self._scratch() as place:
            with self._asked(self.at(name), TraceError), suppress(FileNotFoundError):
                self._fetch_document(place, name)
            yield place / name
            self._put({name: place / name})

    def _fetch_document(self, place: Path, name: str) -> None:
        with self._files().open(self._key(name), "rb") as file:
            (place / name).write_bytes(file.read(LARGEST_DOCUMENT + 1))

    @contextmanager
    def _named(self, place: Path) -> Iterator[None]:
        """Name objects, and not where they were fetched to."""
        try:
            yield
        except TraceError as error:
            problem = error.problem.replace(str(place), self.where)
            raise TraceError(problem, error.remedy) from error

    def heads(self, names: Sequence[str], size: int) -> list[bytes]:
        """Return so many bytes that objects begin with, or as many as they have.

        Raises:
            TraceError: one cannot be had.
        """
        keys = [self._key(name) for name in names]
        with self._asked(self.where, TraceError):
            found: list[bytes] = self._files().cat_ranges(
                keys, [0] * len(keys), [size] * len(keys), on_error="raise"
            )
        return found

    def adopt(self, made: Path | Url, name: str) -> None:
        """Copy within the object store, and remove what was copied."""
        with self._asked(self.at(name), OutputError):
            files = self._files()
            source = files._strip_protocol(str(made))
            files.cp_file(source, self._key(name))
            files.rm_file(source)

    def remove(self, *names: str) -> None:
        """Remove objects."""
        for name in names:
            with self._asked(self.at(name), OutputError):
                self._files().rm_file(self._key(name))

    def refuse_taken(self) -> None:
        """Refuse a prefix that holds objects already: nothing exchanges many of them at once.

        Raises:
            OutputError: it does.
        """
        if held := self.sizes():
            raise OutputError(
                f"{self.where}: holds {len(held)} objects already",
                "--force replaces nothing there: remove them, choose another --out, or pass "
                "--resume to go on with traces",
            )

    def remove_parts(self) -> None:
        """Remove what workers of killed runs have left."""
        self.remove(*(name for name in self.sizes() if name.startswith(PARTS)))

    def _files(self) -> Any:
        """Return the library's file system; it keeps one for all."""
        import fsspec

        return fsspec.core.url_to_fs(self.where)[0]

    def _key(self, name: str = "") -> str:
        """Return what the library calls a file."""
        return str(self._files()._strip_protocol(self.at(name) if name else self.where))

    def _put(self, made: Mapping[str, Path], *, new: bool = False) -> None:
        options = {"mode": "create"} if new else {}
        what = self.at(next(iter(made))) if len(made) == 1 else self.where
        with self._asked(what, OutputError):
            keys = [self._key(name) for name in made]
            self._files().put([str(path) for path in made.values()], keys, **options)

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        try:
            scratch = Scratch()
        except OSError as error:
            raise OutputError(f"no scratch directory: {error}", "set TMPDIR to another") from error
        with scratch as path:
            yield path

    @contextmanager
    def _asked(self, what: str, error: type[PspError]) -> Iterator[None]:
        """Say in one line what the library refuses."""
        try:
            yield
        except PspError:
            raise
        except ImportError as problem:
            protocol = self.where.split(":")[0]
            wanted = _EXTRAS.get(protocol, f"what fsspec needs for {protocol}://")
            raise error(
                f"{self.where}: a library is missing ({reason(problem)})",
                f"install it with: pip install '{wanted}'",
            ) from problem
        except FileNotFoundError as problem:
            raise error(f"{what}: no such bucket or object", "check its name") from problem
        except Exception as problem:
            # Libraries raise their own kinds: no network, other credentials, unknown protocols.
            raise error(f"{what}: {_said(problem)}", _CHECK) from problem


def _said(problem: Exception) -> str:
    """Return what a library says, without what an endpoint's address may hold."""
    return _HOLDER.sub("//", reason(problem)).rstrip(".")


def require_scratch(needed: int, what: str) -> str:
    """Refuse a scratch directory that is too small.

    Args:
        needed: bytes.
        what: is going to lie there.

    Returns:
        A line about it.

    Raises:
        OutputError: it has less room.
    """
    import tempfile

    place = tempfile.gettempdir()
    free, most = shutil.disk_usage(place).free, decimal_size(needed)
    line = f"{place}: {what} needs at most {most}, {decimal_size(free)} are free"
    if needed > free:
        raise OutputError(line, "set TMPDIR to a directory with more room")
    return line


def _within(seconds: float, call: Callable[[str], Answer], key: str) -> Answer:
    """Return what a call returns in time.

    Raises:
        TimeoutError: it takes longer; it goes on in a thread that nobody waits for.
    """
    answers: list[Answer] = []
    problems: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call(key))
        except BaseException as problem:
            problems.append(problem)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if problems:
        raise problems[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds} s")
    return answers[0]
