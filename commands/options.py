"""Options of the commands: one for each setting, and the few that are no settings."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from common.errors import SettingsError
from common.settings import Option, fraction_of, options_of
from common.urls import is_url, path_or_url

Command = TypeVar("Command", bound=Callable[..., Any])

if TYPE_CHECKING:
    _AnyType = click.ParamType[Any]
else:
    _AnyType = click.ParamType  # not generic before click 8.4


class _OnDisk(click.Path):
    """A path; `Path` would make one of a URL too, with a slash less."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if isinstance(value, str) and is_url(value):
            scheme = value.split("://")[0]
            self.fail(
                f"{scheme}:// is no path: only traces may lie in an object store; copy it here, or "
                "mount it",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


class Fraction(click.FloatRange):
    """A range, also in per cent, that holds no NaN, which compares false with both ends."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        try:
            number = fraction_of(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return super().convert(number, param, ctx)


class Parsed(_AnyType):
    """What a setting's own function makes of a text."""

    name = "text"

    def __init__(self, parse: Callable[[str], object]) -> None:
        """Name the function; its ValueError is what the user is told."""
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value; one that is no text is a default."""
        try:
            return self._parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


PATH = _OnDisk(path_type=Path)
TRACES = Parsed(path_or_url)
"""A store of traces, in a directory or in an object store."""


def settings_options(
    kind: type,
    *,
    before: Callable[[dict[str, Any]], None] = lambda values: None,
    optional: tuple[str, ...] = (),
) -> Callable[[Command], Command]:
    """Give a command an option for each setting, and pass it the settings as `config`.

    Args:
        kind: a dataclass of settings, see `common.settings`.
        before: may change what was typed, by name, before the settings are made; it takes out
            options that are no settings.
        optional: settings that need not be typed because `before` sees to them.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    options = options_of(kind)

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**values: Any) -> Any:
            before(values)
            settings = {name: values.pop(name) for name in options}
            try:
                return command(config=kind(**settings), **values)
            except SettingsError as error:
                raise click.UsageError(f"{error}.") from error

        decorated: Any = run
        for name, (inner, option) in reversed(options.items()):
            required = fields[name].default is dataclasses.MISSING and name not in optional
            decorated = _parameter(fields[name], inner, option, required=required)(decorated)
        return typing.cast(Command, decorated)

    return decorate


def _parameter(
    field: dataclasses.Field[Any], kind: Any, option: Option, *, required: bool
) -> Callable[[Command], Command]:
    if field.name == "threads":
        return threads_option
    default = None if field.default is dataclasses.MISSING else field.default
    settings: dict[str, Any] = {"metavar": option.metavar, "type": _click_type(kind, option)}
    if not required:
        settings["default"] = default
    if option.argument:
        nargs = -1 if option.repeat else 1
        return click.argument(field.name, required=required, nargs=nargs, **settings)
    if kind is bool:
        settings = {"default": default, "is_flag": True, "show_default": "/" in option.names[0]}
    else:
        settings |= {
            "multiple": option.repeat,
            "show_default": not option.unset and default not in (None, ()),
        }
    if option.envvar is not None:
        settings |= {"envvar": option.envvar, "show_envvar": True}
    help_text = option.help + (f"  [default: {option.unset}]" if option.unset else "")
    return click.option(*option.names, field.name, required=required, help=help_text, **settings)


def _click_type(kind: Any, option: Option) -> Any:
    if option.parse is not None:
        return Parsed(option.parse)
    if option.choices:
        return click.Choice(option.choices)
    inner = [each for each in typing.get_args(kind) if each not in (NoneType, Ellipsis)]
    plain = inner[0] if inner else kind
    if plain is int:
        return click.IntRange(option.least, option.most)  # type: ignore[arg-type]
    if plain is float:
        return _float_type(option)
    return PATH if plain is Path else plain


def _float_type(option: Option) -> Any:
    low = option.least if option.above is None else option.above
    high = option.most if option.below is None else option.below
    if low is None and high is None:
        return float
    return Fraction(low, high, min_open=option.above is not None, max_open=option.below is not None)


def threads_option(command: Command) -> Command:
    """Add `--threads`: sets torch's threads and passes their number."""

    def apply(ctx: click.Context, parameter: click.Parameter, value: int | None) -> int:
        import torch

        if value is not None:
            torch.set_num_threads(value)
        return torch.get_num_threads()

    return click.option(
        "--threads",
        type=click.IntRange(min=1),
        callback=apply,
        help="CPU threads.  [default: all cores]",
    )(command)


def json_option(command: Command) -> Command:
    """Add `--json`, passed as `as_json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document instead of a table."
    )(command)
