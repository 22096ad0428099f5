"""Settings of `psp bench-operators` and `psp generate`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from common.errors import SettingsError
from common.settings import Device, ModelName, Option, Seed, Threads, check_settings, fraction_of

SHAPES = {"7b": (4096, 11008), "13b": (5120, 13824)}
"""Hidden size and neurons of LLaMA-2."""

SPARSITIES = (0.0, 0.5, 0.67, 0.88, 0.95)

MAX_TOKENS = 8
"""That the operators take at once: with more, nearly every neuron is active for some token, and a
dense product is faster."""

DTYPES = ("auto", "float16", "bfloat16", "float32")


def shape_of(text: str) -> tuple[int, int]:
    """Return (d_model, d_ff) of `7b`, `13b`, or sizes such as `4096,11008`.

    Raises:
        ValueError: it is no shape.
    """
    if text in SHAPES:
        return SHAPES[text]
    if not re.fullmatch(r"0*[1-9]\d{0,6},0*[1-9]\d{0,6}", text, re.ASCII):
        raise ValueError(f"{text!r} is no shape; write 7b, 13b, or sizes such as 4096,11008.")
    d_model, d_ff = text.split(",")
    return int(d_model), int(d_ff)


def shares_of(text: str) -> tuple[float, ...]:
    """Return numbers from 0 to 1, also in per cent, such as `0,0.5,88%`.

    Raises:
        ValueError: one is none.
    """
    shares = tuple(fraction_of(part.strip()) for part in text.split(","))
    for share in shares:
        if not 0 <= share <= 1:
            raise ValueError(f"{share} is not in the range 0<=x<=1.")
    return shares


@dataclass(frozen=True, kw_only=True)
class OperatorBenchConfig:
    """What to measure of the operators."""

    shape: Annotated[
        tuple[int, int] | None,
        Option("Hidden size and neurons.", "7b|13b|D,F", parse=shape_of, unset="7b"),
    ] = None
    sparsity: Annotated[
        tuple[float, ...] | None,
        Option(
            "Shares of inactive neurons.",
            "S,S,...",
            parse=shares_of,
            unset=",".join(f"{share:g}" for share in SPARSITIES),
        ),
    ] = None
    pattern: Annotated[
        str,
        Option(
            "How active neurons lie; TRACES: as in real tokens, from psp collect.",
            "random|clustered|TRACES",
        ),
    ] = "random"
    device: Device = "auto"
    dtype: Annotated[
        str,
        Option("Of weights and inputs; auto: float32 on the CPU, else float16.", choices=DTYPES),
    ] = "auto"
    tokens: Annotated[
        int, Option("Tokens at once, each with neurons of its own.", least=1, most=MAX_TOKENS)
    ] = 1
    repeats: Annotated[int, Option("Timed turns, of which the median counts.", least=1)] = 25
    seed: Seed = 0
    tune: Annotated[
        bool, Option("First measure how this GPU runs the kernels best, and keep it for later.")
    ] = False

    def __post_init__(self) -> None:
        """Refuse settings that measure nothing."""
        check_settings(self, SettingsError)
        if self.tune and self.tokens > 1:
            raise SettingsError("--tune is for one token", "leave out --tokens")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Settings of a continuation."""

    model: ModelName
    prompt: Annotated[str, Option("Text to continue.")] = "The "
    count: Annotated[int, Option("Tokens to generate.", names=("-n",), least=2)] = 64
    operators: Annotated[
        bool,
        Option(
            "Run with the operators too, or the dense model only.",
            names=("--operators/--no-operators",),
        ),
    ] = True
    repeats: Annotated[int, Option("Timed runs of each kind.", least=1)] = 3
    device: Device = "auto"
    dtype: Annotated[
        str,
        Option("Type to run in; auto: float32 on the CPU, else the checkpoint's.", choices=DTYPES),
    ] = "auto"
    threads: Threads = 1

    def __post_init__(self) -> None:
        """Refuse settings that measure nothing."""
        check_settings(self, SettingsError)
