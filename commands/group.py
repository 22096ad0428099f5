"""The group of all commands, of which only the one that is asked for is imported."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import click

from commands.streams import make_ready, printed
from common.errors import PspError

_GONE = {errno.EIO, errno.ENODEV, errno.ENOTCONN, errno.ENXIO, errno.EREMOTEIO, errno.ESTALE}
"""What the system says of a disk that is gone, a network's for instance. Any access may meet it."""

_LOOK = "look at its disk, then start again, with --resume where the command has that"


class Commands(Mapping[str, click.Command]):
    """Commands by name: `gpu-split` is `commands.gpu_split.gpu_split`."""

    def __init__(self, menu: Mapping[str, str]) -> None:
        """Take names and what each does, a few words."""
        self.menu = menu

    def __getitem__(self, name: str) -> click.Command:
        """Import a command."""
        said, module = self.menu[name], name.replace("-", "_")
        command: click.Command = getattr(import_module(f"commands.{module}"), module)
        command.short_help = said
        return command

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self.menu)

    def __len__(self) -> int:
        """Return their number."""
        return len(self.menu)


class Group(click.Group):
    """Turns the one family of user errors into one line and exit code 1."""

    def __init__(self, *args: Any, menu: Mapping[str, str], **settings: Any) -> None:
        """Take the commands' names and what each does; the rest is click's."""
        super().__init__(*args, **settings)
        self.commands = Commands(menu)  # type: ignore[assignment]  # none is added later
        self._menu = menu

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the menu, for which no command is imported."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(self._menu.items()))

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run the command line, whatever its standard streams are."""
        make_ready()
        with printed():
            return super().main(*args, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except PspError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno not in _GONE:
                raise
            named = "a file" if error.filename is None else os.fsdecode(error.filename)
            raise click.ClickException(f"{named}: {error.strerror}; {_LOOK}") from error
