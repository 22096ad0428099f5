"""Settings: what a field's `Option` says holds for Python and for the command line alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import click
import pytest
from click.testing import CliRunner
from conftest import refused

from commands.options import settings_options
from common.errors import DataError, PspError
from common.settings import (
    Option,
    check_settings,
    fraction_of,
    layer_numbers,
    options_of,
)
from gguf_export.settings import ExportConfig, SplitConfig
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.doctor.settings import DoctorConfig
from powerinfer_bridge.estimate.settings import EstimateConfig
from powerinfer_bridge.verify.settings import VerifyConfig
from predictor.collection.settings import CollectConfig
from predictor.training.settings import TrainConfig
from prosparse.settings import SparsifyConfig, SparsityConfig
from quickstart.settings import QuickstartConfig
from report.settings import ReportConfig
from sparse_operators.settings import GenerateConfig, OperatorBenchConfig

EVERY = (
    BenchConfig,
    CollectConfig,
    DoctorConfig,
    EstimateConfig,
    ExportConfig,
    GenerateConfig,
    OperatorBenchConfig,
    QuickstartConfig,
    ReportConfig,
    SparsifyConfig,
    SparsityConfig,
    SplitConfig,
    TrainConfig,
    VerifyConfig,
)


@dataclass(frozen=True, kw_only=True)
class Made:
    """Settings of every kind that there is."""

    file: Annotated[Path, Option(argument=True, metavar="FILE")]
    size: Annotated[int, Option("A size.", least=2, most=9)] = 3
    share: Annotated[float | None, Option("A share.", above=0, below=1, unset="all")] = None
    kind: Annotated[str, Option("A kind.", choices=("a", "b"))] = "a"
    bits: Annotated[int, Option("Bits.", choices=(2, 4))] = 2
    layers: Annotated[tuple[int, ...] | None, Option("Some.", parse=layer_numbers)] = None
    more: Annotated[tuple[Path, ...], Option("Paths.", repeat=True)] = ()
    fast: Annotated[bool, Option("Faster.")] = False
    dense: Annotated[bool, Option("Or not.", names=("--dense/--no-dense",))] = True
    count: Annotated[int, Option("How many.", names=("-n",), least=1)] = 1
    inner: int = 7

    def __post_init__(self) -> None:
        check_settings(self, DataError)


def run(*arguments: str) -> Any:
    """Return what a command was passed as its settings, or click's result where it refused."""
    passed: list[Made] = []

    @click.command()
    @settings_options(Made)
    def command(config: Made) -> None:
        passed.append(config)

    result = CliRunner().invoke(command, arguments)
    return passed[0] if passed else result


def test_defaults_are_the_fields() -> None:
    assert run("f") == Made(file=Path("f"))


def test_every_kind_of_option_reaches_its_field() -> None:
    typed = "f --size 4 --share 5% --kind b --bits 4 --layers 1,0-2 --more x --more y --fast"
    assert run(*typed.split(), "--no-dense", "-n", "8") == Made(
        file=Path("f"),
        size=4,
        share=0.05,
        kind="b",
        bits=4,
        layers=(0, 1, 2),
        more=(Path("x"), Path("y")),
        fast=True,
        dense=False,
        count=8,
    )


def test_help_tells_limits_choices_and_what_an_unset_option_means() -> None:
    text = " ".join(run("--help").output.split())
    for part in ("2<=x<=9", "0<x<1", "[default: all]", "[a|b]", "[2|4]", "[default: 3; 2<=x<=9]"):
        assert part in text
    assert "--inner" not in text


WRONG = [
    ("size", 1, "--size is 1, expected a number of at least 2"),
    ("size", 10, "--size is 10, expected a number of at most 9"),
    ("share", 0.0, "--share is 0, expected a number above 0"),
    ("share", 1.0, "--share is 1, expected a number below 1"),
    ("share", math.nan, "--share is nan, expected a number above 0"),
    ("kind", "c", "--kind is 'c', expected one of a, b"),
    ("bits", 3, "--bits is 3, expected one of 2, 4"),
    ("count", 0, "-n is 0, expected a number of at least 1"),
]


@pytest.mark.parametrize(("name", "value", "said"), WRONG)
def test_limits_hold_for_python_and_for_the_command_line(name: str, value: Any, said: str) -> None:
    with refused(DataError, said):
        Made(file=Path("f"), **{name: value})
    typed = "-n" if name == "count" else f"--{name}"
    refusal = run("f", typed, str(value))
    assert refusal.exit_code == 2
    assert f"Invalid value for '{typed}'" in refusal.output


def test_what_a_parse_function_refuses_is_wrong_usage() -> None:
    refusal = run("f", "--layers", "2-1")
    assert refusal.exit_code == 2
    assert "'--layers': '2-1' ends before it begins." in refusal.output


@pytest.mark.parametrize(
    ("text", "number"), [("0.5", 0.5), ("5%", 0.05), ("1e-3%", 1e-5), ("-2", -2.0)]
)
def test_fractions_may_be_in_per_cent(text: str, number: float) -> None:
    assert fraction_of(text) == pytest.approx(number)


@pytest.mark.parametrize("text", ["", "%", "x%", "nan", "nan%"])
def test_what_is_no_fraction_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        fraction_of(text)


@pytest.mark.parametrize("kind", EVERY)
def test_every_setting_of_a_command_says_what_it_is(kind: type) -> None:
    options = options_of(kind)
    typed = [name for _, option in options.values() for name in option.names]
    assert len(typed) == len(set(typed))
    for name, (_, option) in options.items():
        assert option.argument or option.help.endswith((".", "]")), name
    for field in fields(kind):
        assert field.name in options or field.default is not MISSING


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GenerateConfig(model="m", count=1), "-n is 1, expected a number of at least 2"),
        (lambda: OperatorBenchConfig(dtype="int8"), "--dtype is 'int8'"),
        (lambda: SparsityConfig(model="m", data="d", tokens=1), "--tokens is 1"),
        (lambda: VerifyConfig(file=Path("f"), max_ppl_gap=0.0), "--max-ppl-gap is 0"),
        (lambda: QuickstartConfig(size="vast"), "--size is 'vast'"),
        (lambda: SplitConfig(file=Path("f"), vram_budget="1GiB", context=0), "--ctx is 0"),
    ],
)
def test_settings_of_commands_hold_their_limits(make: Callable[[], object], said: str) -> None:
    with refused(PspError, said):
        make()
