"""Names of text as users write them, and the files that they stand for."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.errors import DataError

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
XZ = "xz"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": XZ}
"""Suffix to the codec, by pyarrow's name where it has one: all but xz."""

STANDARD_INPUT, DATASET = "-", "hf:"
Sources = str | Sequence[str]

_SHOWN = 3  # names in an error


@dataclass(frozen=True, kw_only=True)
class TextFile:
    """A file of text.

    Attributes:
        name: what errors call it.
        place: path, `-`, or the address of a dataset's file.
        kind: one of `KINDS`; None of standard input is for its first bytes to say.
        compression: value of `COMPRESSIONS`, or None; that of standard input is for its first
            bytes to say.
    """

    name: str
    place: str
    kind: str | None
    compression: str | None = None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset of the Hugging Face hub, `hf:NAME[:CONFIG][:SPLIT]`."""

    name: str


def names_of(sources: Sources) -> tuple[str, ...]:
    """Return the names of one source or several."""
    return (sources,) if isinstance(sources, str) else tuple(sources)


def shown(sources: Sources) -> str:
    """Return the names as errors and tables put them."""
    return ", ".join(names_of(sources))


def recorded(sources: Sources) -> str | tuple[str, ...] | None:
    """Return the names as files of results keep them: one as itself, several in order."""
    names = names_of(sources)
    return names[0] if len(names) == 1 else names or None


def is_piped(sources: Sources) -> bool:
    """Whether a source is standard input, which nobody can read again."""
    return any(_is_standard_input(name) for name in names_of(sources))


def need_repeatable(sources: Sources, what: str, remedy: str) -> None:
    """Refuse standard input.

    Args:
        sources: any.
        what: would have to read it again.
        remedy: what the user can do.

    Raises:
        DataError: a source is standard input.
    """
    if is_piped(sources):
        raise DataError(f"{shown(sources)}: {what} cannot read standard input again", remedy)


def list_files(sources: Sources) -> tuple[list[TextFile | Dataset], tuple[str, ...]]:
    """Return the files that sources stand for, in order, and notes of what was passed over.

    Raises:
        DataError: a missing file, a pattern without a match, a folder of mixed kinds or without
            text, an unknown kind, or a file that is named twice.
    """
    found: list[TextFile | Dataset] = []
    notes: list[str] = []
    for name in names_of(sources):
        found += _expanded(name, notes)
    counts = Counter(
        os.path.realpath(each.place) if isinstance(each, TextFile) else each.name for each in found
    )
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise DataError(f"{_some(twice)}: named twice by --data", "name every text once")
    return found, tuple(notes)


def _expanded(name: str, notes: list[str]) -> Sequence[TextFile | Dataset]:
    if name.startswith(DATASET):
        if not 1 <= name.count(":") <= 3 or name.split(":")[1] == "":
            raise DataError(f"{name}: expected hf:NAME[:CONFIG][:SPLIT]")
        return [Dataset(name=name)]
    if _is_standard_input(name):
        return [_standard_input(name)]
    if os.path.isdir(name):
        return _folder(name, notes)
    if not os.path.exists(name) and glob.has_magic(name):
        return _matches(name)
    return [_file(name)]


def _is_standard_input(name: str) -> bool:
    return name == STANDARD_INPUT or name.startswith(f"{STANDARD_INPUT}:")


def _standard_input(name: str) -> TextFile:
    """Take `-`, or `-:KIND` such as `-:csv`."""
    kinds = {f"{STANDARD_INPUT}:{kind[1:]}": kind for kind in KINDS if kind != ".parquet"}
    if name != STANDARD_INPUT and name not in kinds:
        raise DataError(f"{name}: unknown kind of standard input", f"expected {', '.join(kinds)}")
    return TextFile(name="standard input", place=STANDARD_INPUT, kind=kinds.get(name))


def _kind_of(path: str) -> tuple[str | None, str | None]:
    """Return the kind and the compression that a name's suffixes say."""
    stem, last = os.path.splitext(path)
    if last in COMPRESSIONS:
        kind = os.path.splitext(stem)[1]
        return (kind if kind in KINDS and kind != ".parquet" else None), COMPRESSIONS[last]
    return (last if last in KINDS else None), None


def text_file(name: str, place: str) -> TextFile | None:
    """Return the file of a name, None if its suffix says no kind of text."""
    kind, compression = _kind_of(place)
    if kind is None:
        return None
    return TextFile(name=name, place=place, kind=kind, compression=compression)


def _file(name: str) -> TextFile:
    file = text_file(name, name)
    if file is None and (os.path.exists(name) or os.path.splitext(name)[1]):
        kinds = ", ".join(f"FILE{kind}" for kind in KINDS)
        raise DataError(
            f"{name}: unknown kind of data",
            f"expected {kinds}, all but the last also with {' or '.join(COMPRESSIONS)} behind, "
            "a folder, a quoted pattern, - or hf:NAME",
        )
    if file is None or not os.path.exists(name):
        raise DataError(f"{name}: no such file", "check --data")
    if not os.path.isfile(name):
        raise DataError(f"{name}: no plain file", "pipe its text in, with --data -")
    return file


def _folder(name: str, notes: list[str]) -> list[TextFile]:
    """Take the files of known kinds in a folder and those below it, hidden ones left out."""
    paths: list[str] = []
    for place, folders, files in os.walk(name, onerror=_refuse_folder):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        paths += [os.path.join(place, file) for file in files if not file.startswith(".")]
    files_of = {path: text_file(path, path) for path in sorted(paths)}
    found = [file for file in files_of.values() if file is not None]
    others = [path for path, file in files_of.items() if file is None]
    if not found:
        held = f" ({_some(others)})" if others else ""
        raise DataError(
            f"{name}: holds no file of text{held}", f"expected files {', '.join(KINDS)}"
        )
    for file in found:
        if not os.path.isfile(file.place):  # a pipe, a device or a link that leads nowhere
            raise DataError(
                f"{file.place}: no plain file", "remove it, or pass others by a pattern"
            )
    if others:
        notes.append(f"{name}: passed over {_some(others)}, of no kind of text")
    return _alike(name, found)


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"{error.filename}: {error.strerror or error}", "check --data") from error


def _matches(pattern: str) -> list[TextFile]:
    paths = sorted(path for path in glob.iglob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        raise DataError(f"{pattern}: matches no file", "check the pattern, and quote it")
    return _alike(pattern, [_file(path) for path in paths])


def _alike(name: str, files: list[TextFile]) -> list[TextFile]:
    """Demand one kind, and no file beside its own compressed copy."""
    kinds = Counter(file.kind for file in files)
    if len(kinds) > 1:
        held = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=str))
        first = next(kind for kind in KINDS if kind in kinds)
        raise DataError(
            f"{name}: holds mixed kinds ({held})",
            f"pass the files of one kind by a quoted pattern such as '*{first}*', or several "
            "--data",
        )
    stems = Counter(_unpacked(file) for file in files)
    copies = [stem for stem, count in stems.items() if count > 1]
    if copies:
        raise DataError(
            f"{name}: holds {_some(copies)} more than once, compressed and not",
            "keep one of each, or narrow it by a quoted pattern",
        )
    return files


def _unpacked(file: TextFile) -> str:
    return os.path.splitext(file.place)[0] if file.compression else file.place


def _some(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more
