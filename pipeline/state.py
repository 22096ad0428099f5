"""`run.json`: which step of a run has made what of which inputs, so that a killed one goes on.

A step is begun by dropping what an earlier one of other settings or inputs left, and then by a
record with `done` false; it is committed by the same record with `done` true. The file is whole or
absent, so that a kill at any instant leaves a step to do, to go on with, or done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from common.errors import OutputError
from common.files import refuse_existing, remove_output, sha256
from common.lock import locked
from common.outputs import drop_kept, set_aside
from common.sealed import write_sealed
from common.typed_json import plain, read_document
from common.version import tool_version
from pipeline.contents import Contents, Stamp
from results.parts import Amount

STATE = "run.json"
_NOT_DECISIVE = {
    *("out", "traces", "predictors", "file", "dense_gguf", "directories", "powerinfer_bin"),
    *("report", "resume", "force", "timeout", "save_every", "log_every", "eval_every", "jobs"),
    *("ray", "ray_cpus", "ray_gpus", "verbose"),
}
"""Settings of steps that say where something lies or how to go on, and change no result."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a run.

    Attributes:
        name: the command that does the same by itself.
        settings: dataclasses that decide its result.
        facts: what else decides it, ready for JSON.
        chosen_last: settings that the command can choose anew, going on with what it made before.
        inputs: files that it reads, by role.
        made: paths that are its own; they go before it begins anew.
        outputs: files that tell its result.
        work: does it; takes whether to go on with what a killed run left.
    """

    name: str
    settings: tuple[object, ...]
    facts: Mapping[str, object] = field(default_factory=dict)
    chosen_last: tuple[str, ...] = ()
    inputs: Mapping[str, Callable[[], Iterable[Path]]]
    made: tuple[Path, ...]
    outputs: Callable[[], Iterable[Path]]
    work: Callable[[bool], None]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a step.

    Attributes:
        key: checksum of its settings and of its inputs' content.
        base: the same without the settings that are chosen last.
        done: whether it has ended.
        seconds: that it took, over all attempts that ended in order.
        outputs: checksum of what it made; empty before it is done.
    """

    key: str
    base: str
    done: bool
    seconds: Amount = 0.0
    outputs: str = ""


@dataclass(frozen=True, kw_only=True)
class _Document:
    kind: Literal["psp.run"] = "psp.run"
    schema_version: Literal[1] = 1
    tool_version: str
    steps: dict[str, Record]
    files: dict[str, Stamp]


class RunState:
    """The records of a run's directory."""

    def __init__(
        self, out: Path, steps: Mapping[str, Record] = {}, files: Mapping[str, Stamp] = {}
    ) -> None:
        """Begin with what is known; nothing is written."""
        self.out = out
        self.steps, self.contents = dict(steps), Contents(files)

    @classmethod
    def read(cls, out: Path) -> RunState:
        """Read what there is in a directory, an empty state if there is nothing.

        Raises:
            OutputError: a damaged file, or one of another version of psp.
        """
        if not (out / STATE).exists():
            return cls(out)
        found = read_document(
            out / STATE,
            _Document,
            error=OutputError,
            remedy="pass --force to start over",
            expected={"kind": _Document.kind, "schema_version": _Document.schema_version},
        )
        return cls(out, found.steps, found.files)

    def key(self, step: Step, left_out: Collection[str] = ()) -> str:
        """Return the checksum of a step's settings and of its inputs' content.

        Args:
            step: the step.
            left_out: names of settings that do not count.

        Raises:
            OutputError: an input is missing.
        """
        inputs = {role: self.contents.digest(files()) for role, files in step.inputs.items()}
        for role, digest in inputs.items():
            if digest is None:
                raise OutputError(f"{step.name}: its {role} is missing", "restore it")
        passed_over = _NOT_DECISIVE | {*left_out}
        settings = [
            {name: value for name, value in plain(each).items() if name not in passed_over}
            for each in step.settings
        ]
        facts = [step.name, settings, dict(step.facts), inputs]
        return sha256(json.dumps(facts, sort_keys=True).encode())

    def finished(self, step: Step) -> bool:
        """Whether a step's result is there, of the same settings and inputs."""
        record = self.steps.get(step.name)
        if record is None or not record.done:
            return False
        if self.contents.digest(step.outputs()) != record.outputs:
            return False
        return self.key(step) == record.key

    def begin(self, step: Step) -> bool:
        """Record that a step begins; return whether it goes on with what is there of it."""
        key, base = self.key(step), self.key(step, step.chosen_last)
        goes_on = self._goes_on(step, base)
        if not goes_on:
            if self.steps.pop(step.name, None) is not None:
                self.write()
            for path in step.made:
                remove_output(path)
        begun = Record(key=key, base=base, done=False)
        if self.steps.get(step.name) != begun:
            self.steps[step.name] = begun
            self.write()
        return goes_on

    def _goes_on(self, step: Step, base: str) -> bool:
        """Whether a command can go on with what is there: of a killed run, or of another choice."""
        record = self.steps.get(step.name)
        if record is None or record.base != base:
            return False
        intact = record.done and self.contents.digest(step.outputs()) == record.outputs
        return not record.done or (bool(step.chosen_last) and intact)

    def commit(self, step: Step, seconds: float) -> None:
        """Record that a step has ended."""
        outputs = self.contents.digest(step.outputs())
        assert outputs is not None, f"{step.name} made nothing"
        begun = self.steps[step.name]
        self.steps[step.name] = replace(begun, done=True, seconds=seconds, outputs=outputs)
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        document = _Document(
            tool_version=tool_version(), steps=self.steps, files=self.contents.asked
        )
        write_sealed(self.out / STATE, plain(document))


def check_out(out: Path, *, resume: bool, force: bool) -> None:
    """Refuse a directory that may not be written.

    Raises:
        OutputError: it exists and neither was asked for, or is no run's.
    """
    if not (resume and (out / STATE).exists()):
        refuse_existing(out, force=force, marker=STATE, resumable=(out / STATE).exists())


@contextmanager
def claimed(out: Path, *, resume: bool, force: bool) -> Iterator[None]:
    """Make a directory that no other run writes meanwhile, an empty one under `force`.

    Raises:
        OutputError: see `check_out`; or another process is at work there.
    """
    check_out(out, resume=resume, force=force)
    with locked(out):
        if force:
            set_aside(out)
        yield
        drop_kept(out)
