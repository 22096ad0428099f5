"""All files of an export get their names at once, or when somebody next looks.

Before the first gets its name, `.NAME.commit` beside the exported file says which are going to. A
process that is killed in between leaves it, and whoever opens the export next does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from common.errors import OutputError
from common.files import remove_output, write_error
from common.lock import writer_of
from common.outputs import exchange
from common.sealed import read_sealed, write_sealed
from common.typed_json import Closed, JsonError, parse, plain


@dataclass(frozen=True, kw_only=True)
class _Commit(Closed):
    """What is to be done.

    Attributes:
        moves: temporary names to final ones.
        removals: what goes.
    """

    moves: dict[str, str]
    removals: tuple[str, ...]


def commit_file(model_file: Path) -> Path:
    """Return where it is said what is going to be done."""
    return model_file.with_name(f".{model_file.name}.commit")


def begin_commit(model_file: Path, moves: Mapping[Path, Path], removals: Iterable[Path]) -> None:
    """Say what is going to be done; from here on it will be.

    Raises:
        OutputError: the system refused.
    """
    document = _Commit(
        moves={_spelt(os.path.abspath(part)): _spelt(_final(path)) for part, path in moves.items()},
        removals=tuple(_spelt(os.path.abspath(path)) for path in removals),
    )
    write_sealed(commit_file(model_file), plain(document))


def finish_commit(model_file: Path) -> None:
    """Do what a killed export was about to do; nothing where none was, or one is at work.

    Raises:
        OutputError: the system refused, or what is to be done cannot be read.
    """
    file = commit_file(model_file)
    if not file.is_file() or writer_of(model_file) is not None:
        return
    remedy = "remove it and export again"
    try:
        commit = parse(_Commit, read_sealed(file, OutputError, remedy))
    except JsonError as error:
        raise OutputError(f"{file}: {error}", remedy) from error
    here = file.resolve().parent
    try:
        for path in map(_path, commit.removals):
            if _near(path, here):
                remove_output(path)
        for name, final in commit.moves.items():
            part, target = _path(name), _path(final)
            if not part.exists() or part.parent != target.parent:
                continue
            if part.is_dir():
                exchange(part, target)
            else:
                os.replace(part, target)
        file.unlink()
    except OSError as error:
        raise write_error(model_file, error) from error


def end_commit(model_file: Path) -> None:
    """Say that it is done.

    Raises:
        OutputError: the system refused.
    """
    remove_output(commit_file(model_file))


def _spelt(path: str) -> str:
    """Return a path as JSON has it, whatever bytes are in its name."""
    return quote(os.fsencode(path))


def _path(text: str) -> Path:
    return Path(os.fsdecode(unquote_to_bytes(text)))


def _final(path: Path) -> str:
    return os.path.realpath(path) if os.path.islink(path) else os.path.abspath(path)


def _near(path: Path, here: Path) -> bool:
    """Whether a path is one beside the exported file, and no other."""
    return path.parent.resolve() == here
