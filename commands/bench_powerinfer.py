"""`psp bench-powerinfer`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from commands.options import (
    PATH,
    count_option,
    data_option,
    force_option,
    json_option,
    powerinfer_bin_option,
    resume_option,
    seed_option,
    threads_option,
)
from commands.printing import echo, note, print_json


@click.command("bench-powerinfer", short_help="Measure an exported file.")
@click.argument("file", type=PATH, metavar="NAME.powerinfer.gguf")
@powerinfer_bin_option
@click.option(
    "--vram-budget",
    metavar="SIZE",
    help="VRAM for PowerInfer, such as 24GiB.  [default: what is free]",
)
@click.option(
    "--dense-gguf",
    type=PATH,
    metavar="FILE",
    help="The dense model: measured in PowerInfer's dense mode and in llama.cpp, where given.",
)
@click.option(
    "--llama-cpp-bin",
    metavar="DIR|python",
    envvar="PSP_LLAMA_CPP_BIN",
    show_envvar=True,
    help="Directory of llama.cpp's programs, or python for the package llama-cpp-python.",
)
@click.option(
    "--llama-cpp-gguf",
    type=PATH,
    metavar="FILE",
    help="The dense model for llama.cpp.  [default: that of --dense-gguf]",
)
@count_option(
    "-ngl", "--n-gpu-layers", default=0, least=0, help_text="Layers of dense models on the GPU."
)
@data_option(required=False, help_text="Held-out text.  [default: prose shipped with Python]")
@count_option(
    "--ctx",
    "context",
    default=512,
    least=8,
    help_text="Perplexity window, tokens; at most the model's context.",
)
@count_option("--chunks", default=16, least=1, help_text="Perplexity windows, at most.")
@click.option(
    "--model", metavar="DIR|HUB_ID", help="The file's checkpoint, for transformers' perplexity."
)
@click.option(
    "--prompt",
    default="The first thing to know about",
    show_default=True,
    help="Text to continue.",
)
@click.option(
    "--prompts",
    type=PATH,
    metavar="FILE",
    help="Instead: several texts, one a line of a .txt file, or one a row under --field.",
)
@count_option("-n", "generate", default=128, least=2, help_text="Tokens to generate.")
@count_option("--repeats", default=5, least=1, help_text="Rounds of every arm on every prompt.")
@count_option("--warm-up", default=1, least=0, help_text="Rounds before them that do not count.")
@threads_option
@seed_option
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=3600.0,
    show_default=True,
    help="Longest that a run of a program may take, seconds.",
)
@click.option(
    "--hardware",
    metavar="NAME|FILE.yaml|this",
    help="Put the estimate of psp estimate for this hardware beside the figures.",
)
@click.option(
    "--out", type=PATH, metavar="DIR", help="Keep results there, each run as soon as it is done."
)
@resume_option
@force_option
@json_option
def bench_powerinfer(as_json: bool, **options: Any) -> None:
    """Measure speed, sparsity and perplexity with predictors against all neurons.

    With a dense model also against dense engines, in turn.
    """
    from powerinfer_bridge.benchmark.config import BenchConfig
    from powerinfer_bridge.benchmark.run import bench
    from powerinfer_bridge.benchmark.table import bench_table, results_line

    _forget_unused_llama_cpp(options)
    config = BenchConfig(**options)
    with _kept(config.out):
        result = bench(config)
    if as_json:
        return print_json(result)
    echo(bench_table(result))
    if config.out is not None:
        echo(results_line(config.out))


def _forget_unused_llama_cpp(options: dict[str, Any]) -> None:
    """Leave out a llama.cpp that only the environment names, where there is no model for it."""
    source = click.get_current_context().get_parameter_source("llama_cpp_bin")
    if source is ParameterSource.ENVIRONMENT and not (
        options["dense_gguf"] or options["llama_cpp_gguf"]
    ):
        options["llama_cpp_bin"] = None


@contextmanager
def _kept(out: Path | None) -> Iterator[None]:
    """Say how to go on after a benchmark that ended early."""
    from common.errors import PspError
    from powerinfer_bridge.benchmark.journal import JOURNAL, journal_state

    before = journal_state(out)
    try:
        yield
    except (KeyboardInterrupt, PspError):
        if out is not None and journal_state(out) not in (None, before):
            note(f"what was finished is kept in {out / JOURNAL}; the same with --resume goes on")
        raise
