"""A finding of an examination: what was looked at, how it is, and what mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from common.errors import PspError


class Status(str, Enum):
    """How something is, the worst first."""

    PROBLEM = "problem"
    WARNING = "warning"
    NOTE = "note"
    OK = "ok"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line about one thing.

    Attributes:
        check: the thing, a few words.
        status: `problem` stops something from working, `warning` makes it slow or wrong
            unnoticed, `note` is worth knowing, `ok` is as it should be.
        found: what was seen.
        remedy: what to do; None where nothing needs doing.
    """

    check: str
    status: Status
    found: str
    remedy: str | None = None


def ok(check: str, found: str) -> Finding:
    """Return a finding of something that is as it should be."""
    return Finding(check=check, status=Status.OK, found=found)


def note(check: str, found: str, remedy: str | None = None) -> Finding:
    """Return a finding of something worth knowing."""
    return Finding(check=check, status=Status.NOTE, found=found, remedy=remedy)


def warning(check: str, found: str, remedy: str) -> Finding:
    """Return a finding of something that will be slow, or wrong unnoticed."""
    return Finding(check=check, status=Status.WARNING, found=found, remedy=remedy)


def problem(check: str, found: str, remedy: str) -> Finding:
    """Return a finding of something that does not work."""
    return Finding(check=check, status=Status.PROBLEM, found=found, remedy=remedy)


def from_error(check: str, error: PspError) -> Finding:
    """Return the problem that an error tells."""
    remedy = error.remedy or "see the documentation of the command that needs it"
    return problem(check, error.problem, remedy)


def guarded(check: str, run: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield what a check finds; if the check itself fails, that is its last finding.

    Whatever else is raised is a bug and goes on.
    """
    try:
        yield from run()
    except PspError as error:
        yield from_error(check, error)
    except ImportError as error:
        remedy = "mend the installation: python -m pip install --force-reinstall psp"
        yield problem(check, f"not checked, an import failed: {_line(error)}", remedy)
    except OSError as error:
        remedy = "look at the path, its permissions and the disk"
        yield problem(check, f"not checked, the system refused: {_line(error)}", remedy)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
