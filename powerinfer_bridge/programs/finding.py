"""Finding a build's programs where builds put them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from common.errors import EngineError

_PLACES = (".", "bin", "build/bin")
_FOREIGN = {
    "llama-bench": "a llama.cpp build: point --llama-cpp-bin at it",
    "main": "a PowerInfer or an old llama.cpp: point --powerinfer-bin at a PowerInfer",
}
"""By a program that tells whose build it is: what the build is, if another kind was expected."""


def build_directory(directory: Path, names: Iterable[str]) -> Path:
    """Return the usual place below a directory that holds one of the programs, or itself.

    Args:
        directory: of a build; or one of its programs.
        names: programs, one of which must be there.
    """
    if directory.is_file():
        directory = directory.parent
    places = [directory / place for place in _PLACES]
    held = (place for place in places if any((place / name).is_file() for name in names))
    return next(held, directory).resolve()


def require_executable(program: Path, remedy: str) -> None:
    """Do nothing if a file can be executed.

    Raises:
        EngineError: it cannot.
    """
    if program.is_file() and os.access(program, os.X_OK):
        return
    raise EngineError(f"{program}: no executable program{_other(program)}", remedy)


def require_dense(model: Path) -> None:
    """Do nothing if llama.cpp may be given a file.

    Its programs would say what is wrong with a sparse one, but not reliably: they end before their
    logger has written.

    Raises:
        EngineError: it cannot be read, or is a sparse file.
    """
    try:
        with model.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise EngineError(
            f"{model}: cannot be read ({error.strerror or error})", "expected a dense GGUF file"
        ) from error
    if magic == b"PWRI":
        raise EngineError(
            f"{model}: a sparse file, which llama.cpp cannot read",
            "give it the dense one (psp export-gguf --dense)",
        )


def _other(program: Path) -> str:
    """Say what a directory without the program is, if that is known."""
    for name, what in () if program.exists() else _FOREIGN.items():
        if (build_directory(program.parent, (name,)) / name).is_file():
            return f", but {what}"
    return ""
