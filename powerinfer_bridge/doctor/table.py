"""The doctor's findings as text, the worst first."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gguf_export.pwri.inspection import printable
from powerinfer_bridge.doctor.finding import Status

WIDTH = 100
_LABEL = len("PROBLEM  ")
_LONGEST_NAME = 20
"""Names of environment variables are longer; one of them must not push all text to the right."""

_SHOWN_CHARACTERS = 1000
_PLURALS = {"problem": "problems", "warning": "warnings", "note": "notes", "ok": "ok"}


def doctor_table(document: Mapping[str, Any]) -> str:
    """Return a document of `examine` as text.

    Groups by status, each in the order of the checks; then a verdict. Commands to copy are
    not broken, so a line that holds one may be wider than `WIDTH`.
    """
    findings = document["findings"]
    names = [len(finding["check"]) for finding in findings]
    indent = _LABEL + max((length for length in names if length <= _LONGEST_NAME), default=0) + 2
    groups = []
    for status in Status:
        chosen = [finding for finding in findings if finding["status"] == status.value]
        if chosen:
            groups.append("\n".join(_lines(status.value, chosen, indent)))
    return "\n\n".join([*groups, _verdict(document)])


def _lines(status: str, findings: Sequence[Mapping[str, Any]], indent: int) -> Iterator[str]:
    label = status if status in ("ok", "note") else status.upper()
    for finding in findings:
        name = f"{label:<{_LABEL}}{finding['check']}  "
        yield from _wrapped(f"{name:<{indent}}", finding["found"], indent)
        if finding["remedy"] is not None:
            yield from _wrapped(" " * (indent - 3) + "-> ", finding["remedy"], indent)


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


def _verdict(document: Mapping[str, Any]) -> str:
    counts = document["counts"]
    told = [
        f"{number} {status if number == 1 else _PLURALS[status]}"
        for status, number in counts.items()
        if number
    ]
    return f"{'healthy' if document['healthy'] else 'not healthy'}: {', '.join(told)}"
