"""What an examination found, in the order of its checks, as a document and as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from common.errors import printable
from common.finding import Finding, Status
from common.typed_json import plain
from common.version import tool_version

SCHEMA_VERSION = 1
WIDTH = 100
_LABEL = len("PROBLEM  ")
_LONGEST_NAME = 20
"""Names of environment variables are longer; one of them must not push all text to the right."""

_SHOWN_CHARACTERS = 1000
_PLURALS = {"problem": "problems", "warning": "warnings", "note": "notes", "ok": "ok"}


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What was found.

    Attributes:
        kind: of the document, such as `psp.doctor`.
        findings: in the order of the checks.
    """

    kind: str
    findings: tuple[Finding, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Findings by status, the worst first."""
        every = [finding.status for finding in self.findings]
        return {status.value: every.count(status) for status in Status}

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return not self.counts[Status.PROBLEM.value]

    def document(self) -> dict[str, object]:
        """Return it ready for JSON."""
        return {
            "kind": self.kind,
            "schema_version": SCHEMA_VERSION,
            "tool_version": tool_version(),
            "healthy": self.healthy,
            "counts": self.counts,
            "findings": plain(self.findings),
        }


def findings_text(examination: Examination) -> str:
    """Return what was found as text, the worst first.

    Groups by status, each in the order of the checks; then a verdict. Commands to copy are
    not broken, so a line that holds one may be wider than `WIDTH`.
    """
    lengths = [len(finding.check) for finding in examination.findings]
    indent = _LABEL + max((length for length in lengths if length <= _LONGEST_NAME), default=0) + 2
    groups = []
    for status in Status:
        chosen = [finding for finding in examination.findings if finding.status is status]
        if chosen:
            groups.append("\n".join(_lines(chosen, indent)))
    return "\n\n".join([*groups, _verdict(examination)])


def _lines(findings: Sequence[Finding], indent: int) -> Iterator[str]:
    for finding in findings:
        status = finding.status.value
        label = status if status in ("ok", "note") else status.upper()
        name = f"{label:<{_LABEL}}{finding.check}  "
        yield from _wrapped(f"{name:<{indent}}", finding.found, indent)
        if finding.remedy is not None:
            yield from _wrapped(" " * (indent - 3) + "-> ", finding.remedy, indent)


def _wrapped(first: str, text: str, indent: int) -> list[str]:
    shown = printable(text, _SHOWN_CHARACTERS)
    if text.startswith("psp "):
        return [first + shown]
    return textwrap.wrap(
        shown,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _verdict(examination: Examination) -> str:
    told = [
        f"{number} {status if number == 1 else _PLURALS[status]}"
        for status, number in examination.counts.items()
        if number
    ]
    return f"{'healthy' if examination.healthy else 'not healthy'}: {', '.join(told)}"
