"""A command that `benchmarks.soak` breaks, and what of its results is determined."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import ResultError
from common.outputs import kept_beside
from common.provenance import PROVENANCE
from common.sealed import read_sealed
from evaluation.answers import KIND, Answers
from gguf_export.commit import finish_commit
from gguf_export.manifest import MANIFEST
from gguf_export.settings import SUFFIX
from results.bench import BENCH
from results.evaluation import EVALUATION

_MADE_BY_RUN = ("held-out.jsonl", "traces/", "predictors/", "export/", "verify.json")
"""What in a run's directory does not hold times or speeds."""

_MEASURED = ("layers", "ppl_dense", "ppl_sparse", "continuations", "prompts", "settings")
"""What in a benchmark does not."""

Files = dict[str, bytes]
Work = Callable[[], object]


def everything(directory: Path) -> Files:
    """Return all files by name, but for what is hidden."""
    found = (path for path in directory.rglob("*") if path.is_file())
    names = ((path, str(path.relative_to(directory))) for path in found)
    return {name: path.read_bytes() for path, name in names if "/." not in f"/{name}"}


def determined(directory: Path) -> Files:
    """Return what readers see, but for what tells the time."""
    found = everything(directory)
    return {name: data for name, data in found.items() if not name.endswith((PROVENANCE, MANIFEST))}


def determined_by_run(directory: Path) -> Files:
    """Return what a run makes, but for what was timed."""
    found = determined(directory)
    return {
        name: data
        for name, data in found.items()
        if name.partition("/")[2].startswith(_MADE_BY_RUN)
    }


def determined_by_training(directory: Path) -> Files:
    """Return a sparsified model, without what its training tells."""
    found = determined(directory)
    return {name: data for name, data in found.items() if "/training/" not in f"/{name}"}


def measured(directory: Path) -> Files:
    """Return a benchmark's document, but for what was timed."""
    found = {}
    for file in sorted(directory.glob(f"[!.]*/{BENCH.name}")):
        document = read_sealed(file, ResultError, "")
        known = {name: document[name] for name in _MEASURED} | {"rows": len(document["samples"])}
        found[str(file.relative_to(directory))] = json.dumps(known).encode()
    return found


def evaluated(directory: Path) -> Files:
    """Return an evaluation's document and samples, but for what was timed."""
    found = {}
    for name, data in determined(directory).items():
        if f"/{name}".endswith(f"/{EVALUATION.name}"):
            document = read_sealed(directory / name, ResultError, "")
            del document["created"]
            for arm in document["arms"]:
                del arm["seconds"]
            found[name] = json.dumps(document).encode()
        elif "/samples/" in f"/{name}":
            found[name] = data
    return found


def read_answers(file: Path) -> None:
    """Read an arm's answers as an evaluation does that goes on, whatever they were begun with.

    Raises:
        OutputError: a line is damaged.
    """
    first, _, _ = file.read_bytes().partition(b"\n")
    try:
        identity = json.loads(first)["identity"]
    except (ValueError, LookupError, TypeError):
        identity = {}
    Answers(file).read(KIND.reopen(file, identity))


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A command in one directory.

    Attributes:
        name: for counts.
        place: where it writes, and nothing else lies.
        old: makes what is there before, None where nothing is.
        write: the command.
        go_on: what a user runs after a kill.
        read: looks at what is there as the next reader would, None where nobody looks at bytes.
        vouched: names of the files whose bytes it compares, all if empty.
        seen: returns what is determined of a place.
        in_place: the directory beside which the old one is kept meanwhile, None if the old one
            stays until the end.
    """

    name: str
    place: Path
    old: Work | None
    write: Work
    go_on: Work
    read: Work | None
    vouched: tuple[str, ...] = ()
    seen: Callable[[Path], Files] = determined
    in_place: Path | None = None

    @property
    def kept(self) -> Path | None:
        """Where the old directory is kept at this moment, None if it is not."""
        kept = None if self.in_place is None else kept_beside(self.in_place)
        return kept if kept is not None and kept.exists() else None

    def look(self) -> None:
        """Let the next command finish what it would."""
        for file in self.place.glob(f".*{SUFFIX}.commit"):
            finish_commit(file.with_name(file.name[1:].removesuffix(".commit")))


def in_place(
    name: str,
    command: Callable[[Any], object],
    config: Any,
    changes: dict[str, Any],
    *,
    seen: Callable[[Path], Files],
    out: str = "out",
    read: Work | None = None,
    vouched: tuple[str, ...] = (),
) -> Iterator[Writer]:
    """Yield a command that writes in its place, anew and over what other settings made.

    Args:
        name: for counts.
        command: takes settings.
        config: they.
        changes: those of the old result.
        seen: as of a `Writer`.
        out: the setting that names the directory.
        read: as of a `Writer`.
        vouched: likewise.
    """
    place = getattr(config, out)
    forced, resumed = replace(config, force=True), replace(config, resume=True)

    def go_on() -> object:
        begun = kept_beside(place).exists()
        return command(resumed if begun else forced)

    common: dict[str, Any] = {
        **{"place": place.parent, "in_place": place, "seen": seen, "read": read},
        "vouched": vouched,
    }
    again, older = partial(command, forced), partial(command, replace(forced, **changes))
    fresh = partial(command, resumed)
    yield Writer(name=name, old=None, write=fresh, go_on=fresh, **common)
    yield Writer(name=f"{name} --force", old=older, write=again, go_on=go_on, **common)
