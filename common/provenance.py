"""What an artifact was made with: written beside it, shown and compared by `psp inspect`.

The file is no part of what an artifact is. Two that were made from the same things in the same way
are the same in all other files, whenever and however often their making was interrupted.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from common.clock import now
from common.errors import PspError, ResultError
from common.hashing import HashedFile
from common.sealed import read_sealed, write_sealed
from common.typed_json import Closed, JsonError, parse, plain
from common.version import package_version, tool_version

PROVENANCE = "provenance.json"
"""Name of the file in an artifact's directory."""

_REMEDY = "it says what the artifact was made with and nothing else reads it: remove it"
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy")
_HIDDEN = "…/"
"""In place of directories outside the working directory."""


@dataclass(frozen=True, kw_only=True)
class Made(Closed):
    """One run of a command that wrote an artifact, or went on with it.

    Attributes:
        command: as it was typed, paths outside the working directory shortened to their last part;
            None where no command was.
        psp: version.
        commit: of psp's source, None where there is none.
        versions: of packages that have a say in results, and of Python.
        begun: when, in UTC.
        ended: likewise.
        resumed: whether it went on with what runs had begun of which nothing is known here.
    """

    command: str | None
    psp: str
    commit: str | None
    versions: dict[str, str]
    begun: str
    ended: str
    resumed: bool = False


@dataclass(frozen=True, kw_only=True)
class Ingredient(Closed):
    """Something that an artifact was made from.

    Attributes:
        role: `model`, `traces`, `predictors` and so on.
        name: as the user named it, shortened like paths of commands.
        identity: what tells it from others; equal ones are the same thing.
        files: what it consists of, where its files were read as a whole.
    """

    role: str
    name: str
    identity: str | None
    files: tuple[HashedFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Provenance(Closed):
    """What an artifact was made with and from.

    Attributes:
        artifact: what it is, such as `traces`.
        identity: what others call it by.
        seed: of random numbers, None where there are none.
        settings: the command's.
        ingredients: what it was made from.
        runs: that wrote it, in order.
        outputs: what it consists of, names relative to this file; empty where an index of the
            artifact's own says that.
    """

    kind: Literal["psp.provenance"] = "psp.provenance"
    schema_version: Literal[1] = 1
    artifact: str
    identity: str | None
    seed: int | None
    settings: dict[str, object]
    ingredients: tuple[Ingredient, ...]
    runs: tuple[Made, ...]
    outputs: tuple[HashedFile, ...] = ()


def this_run(begun: str, *, resumed: bool = False) -> Made:
    """Return what is known of the process that is at work."""
    return Made(
        command=_command(sys.argv),
        psp=tool_version(),
        commit=source_commit(Path(__file__).resolve().parents[1]),
        versions={"python": platform.python_version(), **_versions()},
        begun=begun,
        ended=now(),
        resumed=resumed,
    )


def record(
    path: Path,
    begun: str,
    *,
    artifact: str,
    identity: str | None,
    seed: int | None,
    settings: Mapping[str, object],
    ingredients: Iterable[Ingredient],
    resumed: bool = False,
    outputs: Iterable[HashedFile] = (),
) -> None:
    """Write down what an artifact was made with, unless a run that goes on changed nothing.

    Args:
        path: the file.
        begun: when the command was started, see `common.clock`.
        artifact: what it is.
        identity: what others call it by.
        seed: of random numbers.
        settings: the command's.
        ingredients: what it was made from.
        resumed: the runs that are known before this one have their part in it.
        outputs: its files, where no index of its own vouches for them.

    Raises:
        OutputError: the system refused.
    """
    before: tuple[Made, ...] = ()
    if resumed:
        with suppress(PspError):
            known = read(path)
            if identity is not None and known.identity == identity:
                return
            before = known.runs
    document = Provenance(
        artifact=artifact,
        identity=identity,
        seed=seed,
        settings={key: _shown(value) for key, value in settings.items()},
        ingredients=tuple(ingredients),
        runs=(*before, this_run(begun, resumed=resumed and not before)),
        outputs=tuple(outputs),
    )
    write_sealed(path, plain(document))


def read(path: Path) -> Provenance:
    """Read what `record` wrote.

    Raises:
        ResultError: missing, damaged, or of another version.
    """
    document = read_sealed(path, ResultError, _REMEDY)
    try:
        return parse(Provenance, document)
    except JsonError as error:
        raise ResultError(f"{path}: {error}", _REMEDY) from error


def shortened(text: str) -> str:
    """Return a path without directories outside the working directory; other texts as they are."""
    inside = os.path.relpath(text) if os.path.isabs(text) else text
    return spelt(inside if not inside.startswith("..") else _HIDDEN + os.path.basename(inside))


def spelt(text: str) -> str:
    """Return a text as JSON has it: bytes of a file's name that are no characters escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def source_commit(root: Path) -> str | None:
    """Return the commit that a checkout is at, None where there is no checkout.

    Nothing is run; changes that are not committed are not seen.
    """
    git = root / ".git"
    try:
        if git.is_file():  # a worktree
            git = Path(git.read_text().removeprefix("gitdir: ").strip())
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        common = git / "commondir"
        places = [git, (git / common.read_text().strip()) if common.is_file() else git]
        for place in places:
            if (place / name).is_file():
                return (place / name).read_text().strip()
        packed = (places[-1] / "packed-refs").read_text().splitlines()
        return next(line.split()[0] for line in packed if line.endswith(f" {name}"))
    except (OSError, ValueError, StopIteration):
        return None


@cache
def _versions() -> Mapping[str, str]:
    """Return what is installed of the packages that matter, as this process found it."""
    return {name: version for name in _PACKAGES if (version := package_version(name))}


def _command(argv: Sequence[str]) -> str | None:
    """Return a command line of psp's; None of another program."""
    if not argv or os.path.basename(argv[0]) not in ("psp", "psp.exe"):
        return None
    words = []
    for word in argv[1:]:
        option, equals, value = word.partition("=")
        given = option.startswith("--") and equals
        words.append(f"{option}={shortened(value)}" if given else shortened(word))
    return shlex.join(["psp", *words])


def _shown(value: object) -> object:
    """Return a setting for JSON, paths shortened."""
    if isinstance(value, Path):
        return shortened(str(value))
    if isinstance(value, str):
        return shortened(value)
    if isinstance(value, list | tuple):
        return [_shown(each) for each in value]
    return plain(value)
