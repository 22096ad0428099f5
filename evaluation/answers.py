"""Answers that an arm has given, kept on disk batch by batch so that a killed run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.files import sha256
from common.json_lines import JournalKind, append
from common.typed_json import Count, parse, plain
from evaluation.backends.backend import Zeros
from results.parts import Amount

Answer = str | tuple[float, bool]
"""What lm-eval takes: a text, or a log-likelihood and whether it is greedy."""

DIRECTORY = "answers"
_LONGEST = 96
KIND = JournalKind(
    kind="psp.evaluation.answers",
    schema_version=1,
    owner="evaluation",
    again="pass --force to ask anew",
    elsewhere="choose another --output-path",
)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Answers that were given at once.

    Attributes:
        keys: what tells requests apart, see `evaluation.requests.request_keys`.
        answers: one a key.
        tokens: that were read for them.
        seconds: that it took.
        size: most requests at once from here on.
        zero: FFN neurons that gave zero; None where nothing counts.
        total: of so many.
    """

    keys: tuple[str, ...]
    answers: tuple[str | tuple[float, bool], ...]
    tokens: Count
    seconds: Amount
    size: Count
    zero: Count | None = None
    total: Count | None = None


@dataclass
class Answers:
    """An arm's answers, in memory and, given a file, on disk.

    Attributes:
        file: the journal; None keeps nothing on disk.
        known: answers by key.
        tokens: that were read for all.
        seconds: that all took.
        size: most requests at once where memory did not do for more; None where it did.
        zeros: counted; None where nothing counts.
    """

    file: Path | None = None
    known: dict[str, Answer] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    size: int | None = None
    zeros: Zeros | None = None

    def add(self, batch: Batch) -> None:
        """Keep answers.

        Raises:
            OutputError: the system refused it.
        """
        self._take(batch)
        if self.file is not None:
            append(self.file, plain(batch))

    def _take(self, batch: Batch) -> None:
        self.known.update(zip(batch.keys, batch.answers, strict=True))
        self.tokens += batch.tokens
        self.seconds += batch.seconds
        self.size = batch.size
        if batch.zero is not None and batch.total is not None:
            before = self.zeros or Zeros()
            self.zeros = Zeros(before.zero + batch.zero, before.total + batch.total)

    def read(self, entries: Sequence[object]) -> None:
        """Take what an earlier process kept.

        Raises:
            OutputError: a line that is damaged, or that repeats earlier ones.
        """
        assert self.file is not None
        for number, entry in enumerate(entries, 2):
            try:
                batch = parse(Batch, entry)
                if self.known.keys() >= set(batch.keys):
                    raise ValueError("all of it was answered before")
                self._take(batch)
            except ValueError as error:
                raise KIND.damaged_line(self.file, number) from error


def open_answers(
    out: Path | None, arm: str, identity: Mapping[str, object], *, resume: bool
) -> Answers:
    """Begin an arm's answers, or go on with them.

    Args:
        out: directory of the evaluation; None keeps nothing on disk.
        arm: its name.
        identity: of what answers, ready for JSON; only the same goes on.
        resume: go on with what is there, if anything.

    Raises:
        OutputError: damaged, of another identity, or it cannot be written.
    """
    if out is None:
        return Answers()
    file = out / DIRECTORY / f"{file_name(arm)}.jsonl"
    answers = Answers(file)
    if resume and file.exists():
        answers.read(KIND.reopen(file, identity))
    else:
        KIND.begin(file, identity)
    return answers


def file_name(name: str) -> str:
    """Return a name of an arm or a task with nothing that a file's name may not hold.

    Long ones are cut and numbered by their hash: files' names have at most 255 bytes.
    """
    text = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
    if len(text.encode()) <= _LONGEST:
        return text
    cut = text.encode()[:_LONGEST].decode(errors="ignore")
    return f"{cut}-{sha256(text.encode())[:16]}"
