"""The journal of a benchmark: every finished measurement, so that a killed one goes on.

`samples.jsonl` holds one JSON object a line: first what the benchmark is of (`identity`), then
each finished run (`sample`) and each quality figure (`quality`), synced to disk as it ends. A last
line without its end is what a killed process was writing; it is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from common.errors import OutputError
from common.files import refuse_existing, remove_output, write_bytes, write_error
from powerinfer_bridge.benchmark.sample import Sample

JOURNAL = "samples.jsonl"
KIND, SCHEMA_VERSION = "psp.bench.samples", 1
Value = TypeVar("Value")


class Journal:
    """Finished measurements, in memory and, given a file, on disk."""

    def __init__(self, file: Path | None = None) -> None:
        """Begin an empty one; see `open_journal` for one on disk."""
        self.samples: list[Sample] = []
        self.quality: dict[str, Any] = {}
        self._file = file

    def add(self, sample: Sample) -> None:
        """Keep a finished run."""
        self.samples.append(sample)
        self._append({"sample": sample.document()})

    def remember(self, name: str, measure: Callable[[], Value]) -> Value:
        """Return a quality figure, measured unless it is kept already."""
        if name not in self.quality:
            self.quality[name] = measure()
            self._append({"quality": {"name": name, "value": self.quality[name]}})
        value: Value = self.quality[name]
        return value

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            with self._file.open("ab") as file:
                file.write(_line(entry))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(self._file, error) from error

    def take(self, line: bytes, number: int) -> None:
        """Read an entry that an earlier process wrote.

        Raises:
            OutputError: it is none.
        """
        try:
            entry = json.loads(line)
            if "sample" in entry:
                self.samples.append(Sample.read(entry["sample"]))
            else:
                self.quality[entry["quality"]["name"]] = entry["quality"]["value"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{self._file}: line {number} is damaged", "pass --force to measure anew"
            ) from error


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
    out: Path | None, identity: Mapping[str, Any], *, resume: bool, force: bool
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
        remove_output(out)
    write_bytes(file, _line({"kind": KIND, "schema_version": SCHEMA_VERSION, "identity": identity}))
    return Journal(file)


def _reopen(file: Path, identity: Mapping[str, Any]) -> Journal:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise write_error(file, error) from error
    whole = content[: content.rfind(b"\n") + 1]
    first, *entries = whole.splitlines() or [b""]
    _same(file, first, identity)
    journal = Journal(file)
    for number, line in enumerate(entries, 2):
        journal.take(line, number)
    if whole != content:
        write_bytes(file, whole)
    return journal


def _same(file: Path, first: bytes, identity: Mapping[str, Any]) -> None:
    """Demand that a journal was begun with the same identity."""
    try:
        head = json.loads(first)
    except ValueError:
        head = None
    if not isinstance(head, dict) or head.get("kind") != KIND:
        raise OutputError(f"{file}: is no benchmark's journal", "choose another --out")
    if head.get("schema_version") != SCHEMA_VERSION:
        raise OutputError(f"{file}: is of another version of psp", "pass --force to measure anew")
    begun, now = _flat(head.get("identity")), _flat(json.loads(_line(identity)))
    for key in [*begun, *now]:
        if begun.get(key) != now.get(key):
            raise OutputError(
                f"{file}: was begun with {key} {begun.get(key)}, now it is {now.get(key)}",
                "go back to that, pass --force to measure anew, or choose another --out",
            )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested objects and arrays by their path."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {name: value}
    return {
        path: leaf
        for key, inner in items
        for path, leaf in _flat(inner, f"{name}.{key}" if name else str(key)).items()
    }


def _line(entry: Mapping[str, Any]) -> bytes:
    # A prompt's bytes that are no characters stay as they are in ASCII escapes.
    return json.dumps(entry, ensure_ascii=True).encode() + b"\n"
