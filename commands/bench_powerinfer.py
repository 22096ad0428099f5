"""`psp bench-powerinfer`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from commands.options import json_option, settings_options
from commands.printing import echo, note, print_json
from powerinfer_bridge.benchmark.settings import BenchConfig


def _forget_unused(values: dict[str, Any]) -> None:
    """Leave out programs that only the environment names, where there is no model for them."""
    models = {
        "llama_cpp_bin": values["dense_gguf"] or values["llama_cpp_gguf"],
        "second_engine_bin": values["second_engine_gguf"],
    }
    for name, model in models.items():
        source = click.get_current_context().get_parameter_source(name)
        if source is ParameterSource.ENVIRONMENT and not model:
            values[name] = None


@click.command("bench-powerinfer")
@settings_options(BenchConfig, before=_forget_unused)
@json_option
def bench_powerinfer(config: BenchConfig, as_json: bool) -> None:
    """Measure speed, sparsity and perplexity with predictors against all neurons.

    With a dense model also against dense engines, in turn.
    """
    from powerinfer_bridge.benchmark.run import bench
    from powerinfer_bridge.benchmark.table import bench_table, results_line

    with _kept(config.out):
        result = bench(config, note)
    if as_json:
        return print_json(result)
    echo(bench_table(result))
    if config.out is not None:
        echo(results_line(config.out))


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
