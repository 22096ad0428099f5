"""The `psp` command line: every command of `commands/`, under one name."""

from __future__ import annotations

import click

from commands.bench_operators import bench_operators
from commands.bench_powerinfer import bench_powerinfer
from commands.collect import collect
from commands.doctor import doctor
from commands.estimate import estimate
from commands.export_gguf import export_gguf
from commands.generate import generate
from commands.gpu_split import gpu_split
from commands.inspect import inspect
from commands.options import Group
from commands.quickstart import quickstart
from commands.report import report
from commands.run import run
from commands.sparsify import sparsify
from commands.sparsity import sparsity
from commands.traces import traces
from commands.train_predictor import train_predictor
from commands.verify import verify


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="psp")
def main() -> None:
    """Activation predictors for PowerInfer, from checkpoint to benchmark."""


for command in (
    quickstart,
    run,
    sparsify,
    sparsity,
    collect,
    traces,
    train_predictor,
    export_gguf,
    gpu_split,
    verify,
    inspect,
    bench_powerinfer,
    report,
    estimate,
    doctor,
    generate,
    bench_operators,
):
    main.add_command(command)
