"""What the commands share: parameter types, options spelled the same everywhere, user errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from common.errors import PspError

Command = TypeVar("Command", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)

if TYPE_CHECKING:
    _LayersType = click.ParamType[tuple[int, ...]]
    _RankType = click.ParamType[int | str | tuple[int, ...]]
else:
    _LayersType = _RankType = click.ParamType  # not generic before click 8.4


class Fraction(click.FloatRange):
    """A range, also in per cent, that holds no NaN, which compares false with both ends."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        if isinstance(value, str) and value.endswith("%"):
            try:
                value = float(value[:-1]) / 100
            except ValueError:
                self.fail(f"{value!r} is not a number.", param, ctx)
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{number} is not a number.", param, ctx)
        return number


class Rank(_RankType):
    """`auto`, one rank, or one for each layer such as `32,64,64`."""

    name = "rank"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return `auto`, a number or a tuple."""
        if not isinstance(value, str) or value == "auto":
            return value
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
            self.fail(f"{value!r} is no rank; write auto, 32, or one for each layer.", param, ctx)
        ranks = tuple(map(int, parts))
        return ranks if len(ranks) > 1 else ranks[0]


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


def count_option(
    *names: str, least: int, help_text: str, **settings: Any
) -> Callable[[Command], Command]:
    """Add an option that takes a number of things, at least `least`."""
    if "default" in settings:
        settings["show_default"] = True
    return click.option(*names, type=click.IntRange(min=least), help=help_text, **settings)


def choice_option(
    name: str, choices: Sequence[str], help_text: str, **settings: Any
) -> Callable[[Command], Command]:
    """Add an option that takes one of some words, the first by default."""
    kind = click.Choice(choices)
    settings = {"default": choices[0], "show_default": True, **settings}
    return click.option(name, type=kind, help=help_text, **settings)


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
        kv_help = "Type of the KV cache in that run; f32 is PowerInfer's --memory-f32."
        command = choice_option("--kv-type", ["f16", "f32"], kv_help)(command)
        context_help = "Context that PowerInfer will be run with (-c), tokens."
        command = count_option("--ctx", "context", least=1, default=512, help_text=context_help)(
            command
        )
        return click.option(
            "--vram-budget",
            required=required,
            metavar="SIZE",
            help="VRAM for PowerInfer, such as 24GiB: write which neurons live there.",
        )(command)

    return decorate


def bound_options(command: Command) -> Command:
    """Add `--rank`, the two bounds, and what measuring them needs."""
    options: list[Callable[[Command], Command]] = [
        click.option(
            "--rank",
            type=Rank(),
            default="auto",
            show_default=True,
            metavar="auto|N|N,N,...",
            help="Hidden units, multiples of 32: chosen, one for all layers, or one for each. With "
            "--recipe dejavu auto is a quarter of the hidden size.",
        ),
        click.option(
            "--max-ppl-gap",
            type=Fraction(0, min_open=True),
            help="Skip neurons as far as perplexity grows by no more.  [default: 0.1% if --rank "
            "is auto, else every threshold is 0]",
        ),
        click.option(
            "--ffn-bytes",
            type=Fraction(0, 1, min_open=True),
            help="Instead: skip neurons until no more of the FFN's bytes is read.",
        ),
        click.option(
            "--predictor-type",
            type=click.Choice(["f16", "q4_0"]),
            default="f16",
            show_default=True,
            help="Type that will be exported, by which bytes are counted.",
        ),
        click.option(
            "--model", metavar="DIR|HUB_ID", help="To measure with.  [default: the traces' own]"
        ),
        click.option(
            "--data", help="Text to measure on, all of it.  [default: the traces' held-out part]"
        ),
        count_option(
            "--eval-tokens", default=16384, least=64, help_text="Tokens to measure on, at most."
        ),
        click.option(
            "--device",
            default="cpu",
            show_default=True,
            help="Torch device to train and run on.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def types_options(command: Command) -> Command:
    """Add `--outtype` and `--predictor-type`, which the export itself checks."""
    for name, what in (("--predictor-type", "predictors"), ("--outtype", "the model")):
        command = click.option(
            name,
            metavar="[f16|q4_0]",
            default="f16",
            show_default=True,
            help=f"Element type of the matrices of {what}.",
        )(command)
    return command


def predictors_option(command: Command) -> Command:
    """Add `--predictors` and `--import-predictors-from`, of which one must be given.

    Either is passed as `predictors`.
    """
    key = "psp.import_predictors_from"

    def keep(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> None:
        ctx.meta[key] = value

    def choose(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
        imported: Path | None = ctx.meta.get(key)
        if value is None and imported is None:
            hint = "'--predictors' or '--import-predictors-from'"
            raise click.MissingParameter(ctx=ctx, param=parameter, param_hint=hint)
        if value is not None and imported is not None:
            raise click.UsageError("Pass --predictors or --import-predictors-from, not both.", ctx)
        return imported if value is None else value

    command = click.option(
        "--import-predictors-from",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE.gguf",
        is_eager=True,  # is read before --predictors, wherever it stands
        expose_value=False,
        callback=keep,
        help="Instead of --predictors: take those in a GGUF file, such as a published one.",
    )(command)
    return click.option(
        "--predictors",
        type=PATH,
        callback=choose,
        metavar="PREDICTORS",
        help="From psp train-predictor; or PowerInfer's model_N.pt, or a GGUF file that has some.",
    )(command)


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
