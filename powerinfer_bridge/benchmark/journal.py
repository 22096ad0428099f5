"""The journal of a benchmark: every finished measurement, so that a killed one goes on.

`samples.jsonl` holds one JSON object a line: first what the benchmark is of (`identity`), then
each finished run (`sample`) and each quality figure (`quality`), synced to disk as it ends. A last
line without its end is what a killed process was writing; it is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from common.errors import OutputError
from common.files import refuse_existing, sha256
from common.json_lines import JournalKind, append
from common.outputs import set_aside
from common.typed_json import JsonError, parse, plain
from powerinfer_bridge.programs.sample import RunSample
from results.bench import SampleRow

JOURNAL = "samples.jsonl"
_KIND = JournalKind(
    kind="psp.bench.samples",
    schema_version=1,
    owner="benchmark",
    again="pass --force to measure anew",
    elsewhere="choose another --out",
)
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A run that counts.

    Attributes:
        arm: name of what ran.
        round: its round, from 1.
        prompt: number of the prompt, from 0.
        run: what was measured.
    """

    arm: str
    round: int
    prompt: int
    run: RunSample

    @property
    def which(self) -> tuple[str, int, int]:
        """What tells it from all others."""
        return self.arm, self.round, self.prompt

    def row(self) -> SampleRow:
        """Return the figures as results list them."""
        run, prompt = self.run, self.run.prompt
        text = None if run.text is None else run.text.encode("utf-8", "surrogateescape")
        return SampleRow(
            arm=self.arm,
            round=self.round,
            prompt=self.prompt,
            decode_seconds=run.decode.seconds,
            decode_tokens=run.decode.tokens,
            prompt_seconds=None if prompt is None else prompt.seconds,
            prompt_tokens=None if prompt is None else prompt.tokens,
            load_seconds=run.load_seconds,
            wall_seconds=run.wall_seconds,
            text_sha256=None if text is None else sha256(text),
        )


@dataclass(frozen=True, kw_only=True)
class _Quality:
    name: str
    value: object


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A line after the first; it has one of both."""

    sample: Sample | None = None
    quality: _Quality | None = None


class Journal:
    """Finished measurements, in memory and, given a file, on disk."""

    def __init__(self, file: Path | None = None) -> None:
        """Begin an empty one; see `open_journal` for one on disk."""
        self.samples: list[Sample] = []
        self.quality: dict[str, object] = {}
        self._file = file
        self._taken: set[tuple[str, int, int]] = set()

    def add(self, sample: Sample) -> None:
        """Keep a finished run."""
        self.samples.append(sample)
        self._append({"sample": plain(sample)})

    def remember(self, name: str, kind: type[Value], measure: Callable[[], Value]) -> Value:
        """Return a quality figure, measured unless it is kept already.

        Args:
            name: of the figure.
            kind: its type: a number, or a dataclass.
            measure: measures it.

        Raises:
            OutputError: what is kept is of another type.
        """
        if name not in self.quality:
            self.quality[name] = plain(measure())
            self._append({"quality": {"name": name, "value": self.quality[name]}})
        try:
            return parse(kind, self.quality[name], name)
        except JsonError as error:
            raise self._damaged(str(error)) from error

    def _append(self, entry: Mapping[str, object]) -> None:
        if self._file is None:
            return
        append(self._file, entry)

    def take(self, entry: object, number: int) -> None:
        """Keep an entry that an earlier process wrote.

        Args:
            entry: as read.
            number: of its line.

        Raises:
            OutputError: it is none, or a run that an earlier one is of too.
        """
        assert self._file is not None
        try:
            found = parse(_Entry, entry)
        except JsonError as error:
            raise _KIND.damaged_line(self._file, number) from error
        if found.sample is not None and found.sample.which not in self._taken:
            self.samples.append(found.sample)
            self._taken.add(found.sample.which)
        elif found.quality is not None:
            self.quality[found.quality.name] = found.quality.value
        else:
            raise _KIND.damaged_line(self._file, number)

    def _damaged(self, problem: str) -> OutputError:
        assert self._file is not None
        return _KIND.damaged(self._file, problem)


def journal_state(out: Path | None) -> tuple[int, int] | None:
    """Return what tells one state of a journal from the next: size and time; None without one."""
    try:
        found = (out / JOURNAL).stat() if out is not None else None
    except OSError:
        return None
    return None if found is None else (found.st_size, found.st_mtime_ns)


def check_out(out: Path | None, *, resume: bool, force: bool) -> None:
    """Make sure that a directory may be written, before anything is measured.

    Raises:
        OutputError: it exists and neither was asked for, or is no benchmark's.
    """
    if out is not None and not (resume and (out / JOURNAL).exists()):
        refuse_existing(out, force=force, marker=JOURNAL, resumable=(out / JOURNAL).exists())


def open_journal(
    out: Path | None, identity: Mapping[str, object], *, resume: bool, force: bool
) -> Journal:
    """Begin a journal, or go on with one.

    Args:
        out: directory that holds it; None keeps nothing on disk.
        identity: what is measured with what, ready for JSON; only the same goes on.
        resume: go on with what `out` holds, if anything.
        force: replace it.

    Raises:
        OutputError: `out` exists and neither was asked for, is no benchmark's or of another
            identity, or cannot be written.
    """
    if out is None:
        return Journal()
    file = out / JOURNAL
    if resume and file.exists():
        return _reopen(file, identity)
    check_out(out, resume=resume, force=force)
    if force:
        set_aside(out)
    _KIND.begin(file, identity)
    return Journal(file)


def _reopen(file: Path, identity: Mapping[str, object]) -> Journal:
    journal = Journal(file)
    for number, entry in enumerate(_KIND.reopen(file, identity), 2):
        journal.take(entry, number)
    return journal
