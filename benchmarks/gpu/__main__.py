"""`python -m benchmarks.gpu`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.kit import Kit, Step
from benchmarks.gpu.machine import machine
from benchmarks.gpu.plan import LIMITS, MODULES, plan, steps_of
from benchmarks.gpu.stage import run_stage
from common.errors import PspError, ResultError
from common.lock import locked
from common.table import table
from report.figures.card import draw_budgets
from report.words import quantity
from results.card import Card, StepEnd

_DRY = 10
"""Times a stage's limit that it may take without a card."""

DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def stages_of(text: str) -> dict[str, tuple[Step, ...]]:
    """Return the steps that are asked for by stage, in order of worth.

    Args:
        text: stages, or a stage's step such as `operators/traced`, commas between.

    Raises:
        ResultError: there is no such stage or step.
    """
    asked = [part.strip() for part in text.split(",")]
    known = {stage: steps_of(stage) for stage in MODULES if _names(asked, stage)}
    names = {f"{stage}/{step.name}" for stage, steps in known.items() for step in steps}
    for name in asked:
        if name not in {*MODULES, *names}:
            stage = name.partition("/")[0]
            there = [step.name for step in known[stage]] if stage in known else MODULES
            raise ResultError(f"--stages: there is no {name!r}", f"choose of {', '.join(there)}")
    return {
        stage: tuple(step for step in steps if {stage, f"{stage}/{step.name}"} & set(asked))
        for stage, steps in known.items()
    }


def _names(asked: Sequence[str], stage: str) -> bool:
    return any(name.partition("/")[0] == stage for name in asked)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory.")
@click.option(
    "--model",
    type=DIRECTORY,
    required=True,
    help="Trained ReGLU LLaMA, such as quickstart-out/model.",
)
@click.option("--data", type=FILE, required=True, help="Its training text.")
@click.option("--eval-data", type=FILE, required=True, help="Its held-out text.")
@click.option("--powerinfer-bin", type=DIRECTORY, help="PowerInfer's programs, built with CUDA.")
@click.option("--llama-cpp-bin", type=DIRECTORY, help="llama.cpp's programs, built with CUDA.")
@click.option(
    "--stages",
    default=",".join(MODULES),
    show_default=True,
    help="Those, or single steps such as operators/traced.",
)
@click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    default=float(sum(LIMITS.values())),
    show_default=True,
    help="Seconds in all.",
)
@click.option("--again", is_flag=True, help="Also run what is done already.")
@click.option("--dry-run", is_flag=True, help="On the CPU, with small sizes; figures mean nothing.")
def main(
    out: Path,
    model: Path,
    data: Path,
    eval_data: Path,
    powerinfer_bin: Path | None,
    llama_cpp_bin: Path | None,
    stages: str,
    budget: float,
    again: bool,
    dry_run: bool,
) -> None:
    """Measure one GPU, the most telling things first, and go on where the last run ended."""
    start = time.monotonic()
    if math.isnan(budget):
        raise click.BadParameter("is not a number", param_hint="--budget")
    kit = Kit(
        out=out.absolute(),
        device="cpu" if dry_run else "cuda",
        dry=dry_run,
        model=model.absolute(),
        data=data.absolute(),
        eval_data=eval_data.absolute(),
        powerinfer=powerinfer_bin and powerinfer_bin.absolute(),
        llama_cpp=llama_cpp_bin and llama_cpp_bin.absolute(),
    )
    try:
        card = run(kit, stages_of(stages), start + budget, again=again)
    except PspError as error:
        raise click.ClickException(str(error)) from error
    click.echo(summary(card), err=True)


def run(kit: Kit, stages: Mapping[str, Sequence[Step]], end: float, *, again: bool) -> Card:
    """Run the steps that fit before a time of the monotonic clock; return all that is known.

    Raises:
        PspError: there is no card, or the directory is another one's, or another run is there.
    """
    from architectures.model import choose_device

    try:
        choose_device(kit.device)
    except PspError as error:
        raise type(error)(error.problem, "pass --dry-run to try it on the CPU") from error
    with locked(kit.out):
        return _run(kit, stages, end, again=again)


def _run(kit: Kit, stages: Mapping[str, Sequence[Step]], end: float, *, again: bool) -> Card:
    journal = Journal(kit.out)
    journal.begin(machine(kit.device), dry=kit.dry)
    scale = _DRY if kit.dry else 1
    done = set() if again else journal.done()
    planned = plan(stages, done, end - time.monotonic(), scale)
    for stage, step in planned.left_out:
        line = "no time for it: the same command again goes on; or pass a longer --budget"
        journal.end(StepEnd(stage=stage, step=step, end="left out", line=line, seconds=0.0))
    for stage, steps in planned.steps.items():
        seconds = min(scale * LIMITS[stage], end - time.monotonic())
        run_stage(kit, stage, steps, max(seconds, 1.0))
    journal.write()
    card = journal.card()
    draw_budgets(kit.out, card.figures)
    return card


def summary(card: Card) -> str:
    """Return a table of all figures and how the steps went."""
    rows = [
        [
            f"{figure.stage}/{figure.step}",
            figure.name,
            quantity(figure.value, figure.unit),
            figure.aim,
            {None: "", True: "met", False: "missed"}[figure.met],
        ]
        for figure in card.figures
    ]
    ends = [f"{end.stage}/{end.step}: {end.end}, {end.line}" for end in card.steps if end.line]
    return "\n".join([table(("step", "figure", "value", "aim", ""), rows), *ends])


if __name__ == "__main__":
    main()
