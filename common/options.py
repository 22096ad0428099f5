"""What the commands share: parameter types, options spelled the same everywhere, user errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from common.errors import PspError

Command = TypeVar("Command", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)

if TYPE_CHECKING:
    _LayersType = click.ParamType[tuple[int, ...]]
else:
    _LayersType = click.ParamType  # not generic before click 8.4


class Fraction(click.FloatRange):
    """A range that holds no NaN, which compares false with both ends."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{number} is not a number.", param, ctx)
        return number


class Layers(_LayersType):
    """Layer numbers such as `0-7,12`, as an ascending tuple."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the numbers."""
        layers: set[int] = set()
        for part in value.split(","):
            first, dash, last = part.strip().partition("-")
            ends = (first, last if dash else first)
            if not all(end.isascii() and end.isdigit() and len(end) < 6 for end in ends):
                problem = f"{part!r} is neither a layer nor a range; write 0-7 or 0,5,9-11."
                self.fail(problem, param, ctx)
            if int(ends[0]) > int(ends[1]):
                self.fail(f"{part!r} ends before it begins.", param, ctx)
            layers.update(range(int(ends[0]), int(ends[1]) + 1))
        return tuple(sorted(layers))


class Group(click.Group):
    """Turns the one family of user errors into one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except PspError as error:
            raise click.ClickException(str(error)) from error


def model_option(command: Command) -> Command:
    """Add `--model`."""
    return click.option(
        "--model", required=True, metavar="DIR|HUB_ID", help="Hugging Face checkpoint."
    )(command)


def out_option(metavar: str, help_text: str) -> Callable[[Command], Command]:
    """Add `--out`."""
    return click.option("--out", required=True, type=PATH, metavar=metavar, help=help_text)


def data_option(*, required: bool, help_text: str) -> Callable[[Command], Command]:
    """Add `--data` and `--field`."""

    def decorate(command: Command) -> Command:
        command = click.option(
            "--field",
            default="text",
            show_default=True,
            help="Key of the text in every kind but .txt.",
        )(command)
        return click.option(
            "--data",
            required=required,
            metavar="FILE|hf:NAME[:CONFIG][:SPLIT]",
            help=f"{help_text}  FILE: .txt, .jsonl, .json or .parquet.",
        )(command)

    return decorate


def seed_option(command: Command) -> Command:
    """Add `--seed`."""
    return click.option(
        "--seed",
        type=click.IntRange(0, 2**32 - 1),
        default=0,
        show_default=True,
        help="Makes a run repeatable.",
    )(command)


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


def force_option(command: Command) -> Command:
    """Add `--force`."""
    return click.option("--force", is_flag=True, help="Replace existing outputs.")(command)


def resume_option(command: Command) -> Command:
    """Add `--resume`."""
    return click.option("--resume", is_flag=True, help="Go on with an interrupted run.")(command)


def json_option(command: Command) -> Command:
    """Add `--json`, passed as `as_json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document instead of a table."
    )(command)


def vram_options(*, required: bool) -> Callable[[Command], Command]:
    """Add `--vram-budget`, `--ctx` and `--kv-type`, the latter two as `context` and `kv_type`."""

    def decorate(command: Command) -> Command:
        command = click.option(
            "--kv-type",
            type=click.Choice(["f16", "f32"]),
            default="f16",
            show_default=True,
            help="Type of the KV cache in that run; f32 is PowerInfer's --memory-f32.",
        )(command)
        command = click.option(
            "--ctx",
            "context",
            type=click.IntRange(min=1),
            default=512,
            show_default=True,
            help="Context that PowerInfer will be run with (-c), tokens.",
        )(command)
        return click.option(
            "--vram-budget",
            required=required,
            metavar="SIZE",
            help="VRAM for PowerInfer, such as 24GiB: write which neurons live there.",
        )(command)

    return decorate


def powerinfer_bin_option(command: Command) -> Command:
    """Add `--powerinfer-bin`."""
    return click.option(
        "--powerinfer-bin",
        type=PATH,
        metavar="DIR",
        envvar="PSP_POWERINFER_BIN",
        show_envvar=True,
        help="Directory of PowerInfer's programs; without it the embedded engine runs.",
    )(command)
