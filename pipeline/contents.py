"""What files hold, by hash: each is read once as long as its size and time stay the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from architectures.gguf_model.source import GGUFSource
from architectures.source import Source
from common.errors import OutputError
from common.files import sha256
from common.hashing import hash_file
from common.typed_json import Closed, Count

_MODEL_SUFFIXES = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".gguf"}


@dataclass(frozen=True, kw_only=True)
class Stamp(Closed):
    """A file as it was when it was last read.

    Attributes:
        bytes: its size.
        mtime_ns: when it was changed.
        xxh3_128: its hash, hexadecimal.
    """

    bytes: Count
    mtime_ns: int
    xxh3_128: str


class Contents:
    """Hashes of files, the known ones and those that were asked for."""

    def __init__(self, known: Mapping[str, Stamp]) -> None:
        """Take over what an earlier run knew, by path."""
        self._known = dict(known)
        self.asked: dict[str, Stamp] = {}

    def digest(self, paths: Iterable[Path]) -> str | None:
        """Return a checksum of names and contents, in their order; None if a file is missing."""
        found = []
        for path in paths:
            if not path.is_file():
                return None
            found.append((path.name, self._stamp(path).xxh3_128))
        return sha256(json.dumps(found).encode()) if found else None

    def _stamp(self, path: Path) -> Stamp:
        key, facts = str(path.absolute()), path.stat()
        known = self._known.get(key)
        if known is None or (known.bytes, known.mtime_ns) != (facts.st_size, facts.st_mtime_ns):
            size, digest = hash_file(path)
            known = Stamp(bytes=size, mtime_ns=facts.st_mtime_ns, xxh3_128=digest)
        self._known[key] = self.asked[key] = known
        return known


def model_files(path: Path) -> list[Path]:
    """Return the files of a checkpoint's directory that decide what it computes.

    Raises:
        OutputError: the directory cannot be read.
    """
    return [each for each in files_in(path, deep=False) if each.suffix in _MODEL_SUFFIXES]


def source_files(origin: Source) -> list[Path]:
    """Return the files of a model that decide what it computes, all members of a split set."""
    return list(origin.file.files) if isinstance(origin, GGUFSource) else model_files(origin.path)


def files_in(directory: Path, *, deep: bool = True) -> list[Path]:
    """Return a directory's files in order, hidden ones left out.

    Raises:
        OutputError: the directory cannot be read.
    """

    def walk(place: Path) -> Iterator[Path]:
        for path in sorted(place.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_file():
                yield path
            elif deep and path.is_dir():
                yield from walk(path)

    try:
        return list(walk(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(
            f"{directory}: {error.strerror or error}", "check the directory"
        ) from error
