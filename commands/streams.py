"""Standard streams that are closed, full, or of a character set that lacks what is printed."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

_PRINTER = "click.utils"
"""The module by which everything is printed, help and errors too."""

_STREAMS = (0, 1, 2)


def make_ready() -> None:
    """Let any text be printed, and no file be opened under the number of a standard stream.

    A character that standard output's encoding lacks comes escaped.
    """
    for number in _STREAMS:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def printed() -> Iterator[None]:
    """End with one line and exit code 1 where standard output takes no more.

    A reader that went away (`psp … | head -1`) needs no line: click ends quietly with code 1.

    Raises:
        SystemExit: it is full, or the like.
    """
    try:
        yield
    except OSError as error:
        if not _while_printing(error):
            raise
        _lead_nowhere(1)
        if error.errno != errno.EPIPE:
            tell(f"Error: cannot write standard output: {error.strerror}; print it somewhere else")
        raise SystemExit(1) from error
    finally:
        try:
            sys.stderr.flush()
        except (OSError, ValueError):
            _lead_nowhere(2)


def tell(line: str) -> None:
    """Print a line to standard error; where that takes none, go on: no result depends on it."""
    with suppress(OSError):
        click.echo(line, err=True)


def _while_printing(error: OSError) -> bool:
    """Whether it comes of printing; an error of writing to an open file names none."""
    frames, place = set(), error.__traceback__
    while place is not None:
        frames.add(place.tb_frame.f_globals.get("__name__"))
        place = place.tb_next
    return _PRINTER in frames


def _lead_nowhere(stream: int) -> None:
    """Lead a standard stream nowhere, or what is left of it fails again when Python ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream)
    os.close(nowhere)
