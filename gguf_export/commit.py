"""All files of an export get their names at once, or when somebody next looks.

Before the first gets its name, `.NAME.commit` beside the exported file says which are going to. A
process that is killed in between leaves it, and whoever opens the export next does the rest. What
is said are names beside that file which exports give, never paths: it may come from a stranger.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from common.errors import OutputError
from common.files import part_of, remove_output, write_error
from common.lock import writer_of
from common.outputs import exchange
from common.sealed import read_sealed, write_sealed
from common.typed_json import Closed, JsonError, parse, plain
from gguf_export.manifest import manifest_path
from gguf_export.pwri.gpu_index import index_path
from gguf_export.pwri.statistics import ACTIVATION_DIRECTORY
from gguf_export.settings import SUFFIX


@dataclass(frozen=True, kw_only=True)
class _Commit(Closed):
    """What is to be done, by numbers of the files that an export may write.

    Attributes:
        moves: those that get their names.
        removals: those that go.
    """

    moves: tuple[int, ...]
    removals: tuple[int, ...]


def commit_file(model_file: Path) -> Path:
    """Return where it is said what is going to be done."""
    return model_file.with_name(f".{model_file.name}.commit")


def own_files(model_file: Path) -> list[Path]:
    """Return whatever an export may write, in an order that never changes.

    The exported file, predictors, statistics, the dense file, the manifest, the GPU index.
    """
    stem = model_file.name.removesuffix(SUFFIX)
    return [
        model_file,
        model_file.with_name(f"{stem}.predictors"),
        model_file.with_name(ACTIVATION_DIRECTORY),
        model_file.with_name(f"{stem}.dense.gguf"),
        manifest_path(model_file),
        index_path(model_file),
    ]


def begin_commit(model_file: Path, moves: Collection[Path], removals: Collection[Path]) -> None:
    """Say what is going to be done; from here on it will be.

    Args:
        model_file: the exported file.
        moves: which of `own_files` get their names.
        removals: which go.

    Raises:
        OutputError: the system refused.
    """
    own = own_files(model_file)
    document = _Commit(
        moves=tuple(number for number, path in enumerate(own) if path in moves),
        removals=tuple(number for number, path in enumerate(own) if path in removals),
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
    own, remedy = own_files(model_file), "remove it and export again"
    try:
        commit = parse(_Commit, read_sealed(file, OutputError, remedy))
        if not all(0 <= number < len(own) for number in (*commit.moves, *commit.removals)):
            raise JsonError("names files that no export has")
    except JsonError as error:
        raise OutputError(f"{file}: {error}", remedy) from error
    try:
        for number in commit.removals:
            remove_output(own[number])
        for number in commit.moves:
            part, target = part_of(own[number])
            if part.is_dir():
                exchange(part, target)
            elif part.exists():
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
