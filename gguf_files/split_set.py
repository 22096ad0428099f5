"""A model in several GGUF files, `NAME-00001-of-0000N.gguf`, seen as one.

Source: llama.cpp@3e00f05 tools/gguf-split/gguf-split.cpp and gguf-py's writer. The first file holds
the metadata, and may hold no tensor. Each says its number from 0 on, how many files there are, and
how many tensors they have together. PowerInfer@d3ebd7c knows nothing of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType

from common.errors import FormatError
from gguf_files.reader import GGUFFile, TensorInfo

NUMBER_KEY, COUNT_KEY, TENSORS_KEY = "split.no", "split.count", "split.tensors.count"

_NAME = re.compile(r"(.*-)([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_REMEDY = "fetch all files of the set into one directory again"


def open_gguf(path: Path, remedy: str | None = None) -> GGUFFile:
    """Open a file, or the whole set if it is a member of one; see `GGUFFile`.

    Raises:
        FormatError: damaged; or a set whose members are missing, renamed or of different sets.
    """
    file = GGUFFile(path, remedy)
    return GGUFSet(file) if split_count(file) > 1 else file


def split_count(file: GGUFFile) -> int:
    """Return how many files a file says that it is one of, 1 if it says nothing."""
    return int(file.optional(COUNT_KEY, GGUFValueType.UINT16, 1))


class GGUFSet(GGUFFile):
    """A set with the interface of one file: the first's metadata, the tensors of all.

    A tensor's `start` counts from the beginning of its own file.
    """

    def __init__(self, member: GGUFFile) -> None:
        """Open the other members.

        Raises:
            FormatError: see `open_gguf`.
        """
        paths = member_paths(member.path, split_count(member))
        remedy = self.remedy = member.remedy
        members = [member if path == member.path else GGUFFile(path, remedy) for path in paths]
        _check_members(members)
        first = members[0]
        self.path, self.files = first.path, tuple(paths)
        self.sparse, self.version, self.alignment = first.sparse, first.version, first.alignment
        self.values = first.values
        self._members = {name: each for each in members for name in each.tensors}
        self.tensors: dict[str, TensorInfo] = {}
        for each in members:
            self.tensors |= each.tensors

    def _member(self, name: str) -> GGUFFile:
        return self._members[self._info(name).name]

    def holder(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._member(name).path

    def mapped(self, name: str) -> npt.NDArray[np.uint8]:
        """Map a tensor's bytes from the file that holds it; see `GGUFFile.mapped`."""
        return self._member(name).mapped(name)

    def tensor(self, name: str, rows: npt.NDArray[np.integer[Any]] | None = None) -> Any:
        """Return a tensor's numbers from the file that holds it; see `GGUFFile.tensor`."""
        return self._member(name).tensor(name, rows)

    def forget(self) -> None:
        """Give the memory of all files back; see `GGUFFile.forget`."""
        for each in set(self._members.values()):
            each.forget()


def member_paths(path: Path, count: int) -> list[Path]:
    """Return the paths of a set, of which one is known.

    Raises:
        FormatError: its name is not that of a member of so many, or another is missing.
    """
    match = _NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise FormatError(
            f"{path}: is one of {count} files of a set, which its name does not say",
            f"give each its name back: NAME-00001-of-{count:05}.gguf and so on",
        )
    paths = [path.with_name(f"{match[1]}{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    missing = [each for each in paths if not each.is_file()]
    if missing:
        raise FormatError(f"{missing[0]}: {len(missing)} of {count} files are missing", _REMEDY)
    return paths


def _check_members(members: Sequence[GGUFFile]) -> None:
    """Refuse files that are not the parts of one model, each once."""
    first, names = members[0], set[str]()
    expected = first.value(TENSORS_KEY, GGUFValueType.INT32)
    for number, each in enumerate(members):
        _check_member(each, number, len(members), expected)
        if each.sparse != first.sparse:
            raise _foreign(each, "its magic is another")
        if not names.isdisjoint(each.tensors):
            raise _foreign(each, f"it repeats tensors of {first.path.name} or those after it")
        names |= each.tensors.keys()
    if len(names) != expected:
        raise _foreign(first, f"the files hold {len(names)} tensors, {TENSORS_KEY} is {expected}")


def _check_member(file: GGUFFile, number: int, count: int, tensors: int) -> None:
    for key, kind, expected in (
        (NUMBER_KEY, GGUFValueType.UINT16, number),
        (COUNT_KEY, GGUFValueType.UINT16, count),
        (TENSORS_KEY, GGUFValueType.INT32, tensors),
    ):
        found = file.value(key, kind)
        if found != expected:
            raise _foreign(file, f"{key} is {found}, expected {expected}")


def _foreign(file: GGUFFile, problem: str) -> FormatError:
    return FormatError(f"{file.path}: no part of one set with the others: {problem}", _REMEDY)
