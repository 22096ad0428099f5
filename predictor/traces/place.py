"""Where the files of a trace store lie: a directory, or a prefix in an object store.

Names are relative and written with `/`, as `layer-00/shard-00000.safetensors`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from common.files import atomic_path, put_in_place
from common.urls import Url

PARTS = ".parts-"
"""How names of what workers of a cluster write begin, where they lie within the place itself."""


class Place(ABC):
    """Holds the files of a store.

    Attributes:
        where: path or URL.
    """

    where: Path | Url

    def __str__(self) -> str:
        """Return how users name it."""
        return str(self.where)

    def absolute(self) -> Path | Url:
        """Return how other processes name it."""
        return self.where.absolute() if isinstance(self.where, Path) else self.where

    @abstractmethod
    def at(self, name: str) -> Path | Url:
        """Return where a file lies."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is a file."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Return the name of every file, and its bytes."""

    @abstractmethod
    def writing(self, *names: str, new: bool = False) -> AbstractContextManager[list[Path]]:
        """Write files, each whole or not at all.

        Args:
            names: of the files; what there is under one is replaced.
            new: refuse to replace it, where the place can see to that.

        Yields:
            A path to write to for each; they become the files if the block ends without an
            exception.

        Raises:
            OutputError: the system, or the object store, refused.
        """

    @abstractmethod
    def reading(self, *names: str) -> AbstractContextManager[list[Path]]:
        """Let files be read.

        Yields:
            A path for each. What is mapped stays after the block, paths may not.

        Raises:
            TraceError: one cannot be had; whoever reads a path says what else is wrong with it.
        """

    @abstractmethod
    def document(self, name: str) -> AbstractContextManager[Path]:
        """Do the same with one file, of which no more is had than a document may have."""

    @abstractmethod
    def changing(self, name: str) -> AbstractContextManager[Path]:
        """Let a small file be read and written again.

        Yields:
            Its path; whoever writes there does it whole or not at all.

        Raises:
            PspError: as for `reading` and `writing`.
        """

    @abstractmethod
    def adopt(self, made: Path | Url, name: str) -> None:
        """Let what another process wrote, whole and in the same kind of place, become a file.

        Raises:
            OutputError: the system, or the object store, refused.
        """

    @abstractmethod
    def remove(self, *names: str) -> None:
        """Remove files."""


class Directory(Place):
    """A directory of this machine's, or one that all machines of a cluster see."""

    where: Path

    def __init__(self, where: Path) -> None:
        """Name it; it need not be there yet."""
        self.where = where

    def at(self, name: str) -> Path:
        """See `Place`, like the others."""
        return self.where / name

    def has(self, name: str) -> bool:
        """Whether there is a file."""
        return self.at(name).exists()

    def sizes(self) -> dict[str, int]:
        """Return the name of every file, and its bytes."""
        files = (file for file in self.where.rglob("*") if file.is_file())
        return {file.relative_to(self.where).as_posix(): file.stat().st_size for file in files}

    @contextmanager
    def writing(self, *names: str, new: bool = False) -> Iterator[list[Path]]:
        """Write beside them and rename; who else writes a directory is told by its lock."""
        with ExitStack() as stack:
            yield [stack.enter_context(atomic_path(self.at(name))) for name in names]

    @contextmanager
    def reading(self, *names: str) -> Iterator[list[Path]]:
        """Give out the files themselves."""
        yield [self.at(name) for name in names]

    @contextmanager
    def document(self, name: str) -> Iterator[Path]:
        """Give out the file itself."""
        yield self.at(name)

    changing = document

    def adopt(self, made: Path | Url, name: str) -> None:
        """Rename it."""
        assert isinstance(made, Path)
        self.at(name).parent.mkdir(parents=True, exist_ok=True)
        put_in_place(made, self.at(name))

    def remove(self, *names: str) -> None:
        """Remove files."""
        for name in names:
            self.at(name).unlink()


def place_of(where: Path | Url) -> Place:
    """Return the place that a path or URL names; nothing is asked of it yet."""
    if isinstance(where, Path):
        return Directory(where)
    from predictor.traces.objects import Objects

    return Objects(where)
