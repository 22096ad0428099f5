"""Settings: frozen dataclasses whose fields say what a user is told of them and what they may be.

A field's type is `Annotated[type, Option(...)]`; the command line makes an option of each
(`commands.options.settings_options`) and `check_settings` holds a caller from Python to the same
limits. Modules of settings import nothing heavy, so that `psp --help` stays fast.
"""

from __future__ import annotations

import dataclasses
import operator
import typing
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from common.errors import PspError


@dataclasses.dataclass(frozen=True)
class Option:
    """What is known of a setting beside its type and default.

    Attributes:
        help: one or two sentences for users.
        metavar: stands for the value in help.
        names: as they are typed; `--` and the field's name by default. A pair of flags is written
            `--operators/--no-operators`.
        choices: the values that it may have.
        least: the smallest number.
        above: what a number must exceed.
        most: the largest number.
        below: what a number must stay under.
        parse: makes the value of what was typed; raises ValueError that says what is wrong.
        unset: what help calls the default, where the value itself would say nothing.
        envvar: variable of the environment that gives it too.
        repeat: may be given several times; the field is a tuple.
        argument: is no option but an argument.
    """

    help: str = ""
    metavar: str | None = None
    _: dataclasses.KW_ONLY
    names: tuple[str, ...] = ()
    choices: tuple[object, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    parse: Callable[[str], object] | None = None
    unset: str | None = None
    envvar: str | None = None
    repeat: bool = False
    argument: bool = False

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with a value, None if nothing is."""
        if self.choices and value not in self.choices:
            return f"is {value!r}, expected one of {', '.join(map(str, self.choices))}"
        for limit, words, holds in (
            (self.least, "of at least", operator.ge),
            (self.above, "above", operator.gt),
            (self.most, "of at most", operator.le),
            (self.below, "below", operator.lt),
        ):
            if limit is not None and not holds(value, limit):  # NaN holds nothing
                return f"is {value:g}, expected a number {words} {limit:g}"
        return None


@cache
def options_of(kind: type) -> dict[str, tuple[Any, Option]]:
    """Return type and `Option`, names filled in, of each field that has one, by name, in order."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = {}
    for field in dataclasses.fields(kind):
        inner, *notes = typing.get_args(hints[field.name]) or (None,)
        for note in notes:
            if isinstance(note, Option):
                names = note.names or (f"--{field.name.replace('_', '-')}",)
                found[field.name] = inner, dataclasses.replace(note, names=names)
    return found


def option_of(kind: type, name: str, **changes: Any) -> Option:
    """Return the `Option` of another settings' field, for settings that pass it on.

    Args:
        kind: the other settings.
        name: of the field.
        changes: attributes of the option that differ here.
    """
    return dataclasses.replace(options_of(kind)[name][1], **changes)


def check_settings(settings: Any, error: type[PspError]) -> None:
    """Demand of every setting what its `Option` says; None and what is parsed are passed over.

    Raises:
        error: naming the first that does not hold.
    """
    kind: type = type(settings)
    for name, (_, option) in options_of(kind).items():
        value = getattr(settings, name)
        if value is not None and option.parse is None and not option.repeat:
            problem = option.problem(value)
            if problem is not None:
                raise error(f"{option.names[-1]} {problem}")


MODEL_FORMS = "DIR|FILE.gguf|HUB_ID"
ModelName = Annotated[str, Option("Hugging Face checkpoint, or GGUF file.", MODEL_FORMS)]
Field = Annotated[str, Option("Key of the text in every kind but .txt.")]
Seed = Annotated[int, Option("Makes a run repeatable.", least=0, most=2**32 - 1)]
Force = Annotated[bool, Option("Replace existing outputs.")]
Resume = Annotated[bool, Option("Go on with an interrupted run.")]
ModelFile = Annotated[Path, Option(metavar="NAME.powerinfer.gguf", argument=True)]
Device = Annotated[str, Option("Torch device; auto: a GPU if there is one.")]
Threads = Annotated[int, Option("CPU threads.", least=1, unset="all cores")]
POWERINFER_VARIABLE, LLAMA_CPP_VARIABLE = "PSP_POWERINFER_BIN", "PSP_LLAMA_CPP_BIN"
SECOND_ENGINE_VARIABLE = "PSP_SECOND_ENGINE_BIN"
"""Environment variables that name the directories of programs."""

PowerInferBin = Annotated[
    Path | None,
    Option(
        "Directory of PowerInfer's programs; without it the embedded engine runs.",
        "DIR",
        envvar=POWERINFER_VARIABLE,
    ),
]

SecondEngineBin = Annotated[
    Path | None,
    Option(
        "Directory of the programs of PowerInfer's second engine (its folder smallthinker/).",
        "DIR",
        envvar=SECOND_ENGINE_VARIABLE,
    ),
]


def text_option(help: str, *, unset: str | None = None, piped: bool = True) -> Option:
    """Return the option of text sources; see `common.documents.read_documents`.

    The setting's type is `Sources`; where it may be left out its default is ().

    Args:
        help: what the text is for.
        unset: see `Option`.
        piped: whether it may be standard input.
    """
    help += "  Repeatable; docs/collect.md lists the kinds of files."
    metavar = f"FILE|DIR|PATTERN|{'-|' * piped}hf:NAME[:CONFIG][:SPLIT]"
    return Option(help, metavar, unset=unset, repeat=True)


def layers_option(help: str) -> Option:
    """Return the option of the layers to go through."""
    return Option(help, "0-7,12", parse=layer_numbers, unset="all")


def fraction_of(text: str) -> float:
    """Return a number, also in per cent.

    Raises:
        ValueError: it is none, or NaN.
    """
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a number.") from error
    if number != number:
        raise ValueError(f"{text} is not a number.")
    return number


def numbers_of(text: str) -> tuple[float, ...]:
    """Return numbers such as `0,0.01,0.1`.

    Raises:
        ValueError: one is no number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{text!r} is no list of numbers; write 0,0.01,0.1.") from error


def layer_numbers(text: str) -> tuple[int, ...]:
    """Return layer numbers such as `0-7,12`, ascending.

    Raises:
        ValueError: it is no such list.
    """
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdigit() and len(end) < 6 for end in ends):
            raise ValueError(f"{part!r} is neither a layer nor a range; write 0-7 or 0,5,9-11.")
        if int(ends[0]) > int(ends[1]):
            raise ValueError(f"{part!r} ends before it begins.")
        layers.update(range(int(ends[0]), int(ends[1]) + 1))
    return tuple(sorted(layers))
