"""How far a cluster's work scales: its scheduler simulated, held to runs that were made.

Spans of the same work by 1, 2, 4, 8 workers are the input, a JSON line each (`cluster.spans.Span`),
a file a run. A line is printed for each run, with what constants and durations of the *other* runs
foretell of it, then one for each number of workers with what it would take and what it would gain
without each of the simulation's terms, then one that says where it stops scaling, and why.
`asleep` writes such spans: its workers sleep in the place of items, so that more of them than there
are cores show what the scheduler costs.

    python -m benchmarks.ray_cluster asleep --workers 8 --out eight.jsonl
    python -m benchmarks.ray_cluster simulate one.jsonl two.jsonl four.jsonl eight.jsonl --as-ready
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import click
from tqdm import tqdm

from benchmarks.ray_nodes import cluster_of
from benchmarks.shared import print_line
from cluster.nodes import Worker
from cluster.pool import several_on_nodes
from cluster.spans import Span
from cluster.watch import Watch, spans_heard
from cluster.worker import Tell
from common.typed_json import parse
from cost_model.scheduling import Constants
from cost_model.span_fit import POOR, check, fit, scale, stops, workers_of

_CLOCK = ("sent", "begun", "ended", "received", "committed")


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--in-order/--as-ready", default=False, help="How items are committed.")
@click.option("--start-up", default=0.0, help="Seconds until the first worker is ready.")
@click.option("--item-bytes", default=0.0, help="That an item reads or writes.")
@click.option("--bandwidth", default=1e9, show_default=True, help="Of all nodes, bytes a second.")
@click.option("--to", default="16,32,64", show_default=True, help="Numbers of workers.")
def simulate(
    runs: tuple[Path, ...],
    in_order: bool,
    start_up: float,
    item_bytes: float,
    bandwidth: float,
    to: str,
) -> None:
    """Hold the simulated scheduler to runs, and let it go on to more workers."""
    known = Constants(in_order=in_order, start_up=start_up, shared=item_bytes / bandwidth)
    spans = [read_spans(path) for path in runs]
    if len(spans) < 2:
        raise click.UsageError("one run can be held to nothing: pass two or more")
    for path, checked in zip(runs, check(spans, known), strict=True):
        print_line({"run": path.name, **asdict(checked), "error": checked.error})
    measured = {workers_of(run) for run in spans}
    fitted, items = fit(spans, known), sorted({span.item for run in spans for span in run})
    print_line({"items": len(items), "constants": asdict(fitted.constants)})
    scaled = scale(fitted, items, sorted({*measured, *map(int, to.split(","))}))
    for found in scaled:
        print_line({"measured": found.workers in measured, **asdict(found), "cause": found.cause})
    stop = stops(fitted, items, scaled[-1].workers)
    print_line(
        {
            "efficiency_below": POOR,
            "workers": stop.workers if stop else None,
            "cause": stop.cause if stop else None,
        }
    )


@click.command()
@click.option("--workers", required=True, type=click.IntRange(1))
@click.option("--items", default=64, show_default=True)
@click.option("--commit", default=0.05, show_default=True, help="Seconds of the driver, asleep.")
@click.option("--in-order/--as-ready", default=False, help="How items are committed.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
def asleep(workers: int, items: int, commit: float, in_order: bool, out: Path) -> None:
    """Write the spans of items of 0.3 to 0.9 s that take no processor."""
    spans: list[Span] = []
    small = Worker(cpus=1, gpus=0, memory=1 << 20)
    with cluster_of(workers), tqdm(disable=True) as bar, spans_heard(spans.append):
        watch = Watch(bar, click.echo, what="items", named=str)
        numbers = range(items)
        for _ in several_on_nodes(sleeper, numbers, small, watch, most=workers, ordered=in_order):
            time.sleep(commit)
    out.write_text("".join(json.dumps(asdict(span)) + "\n" for span in spans))


def sleeper() -> Callable[[int, Tell], int]:
    """Return the work of a worker that sleeps, as long for an item every time."""

    def work(item: int, tell: Tell) -> int:
        time.sleep(random.Random(item).uniform(0.3, 0.9))
        return item

    return work


def read_spans(path: Path) -> Sequence[Span]:
    """Return the spans of a run.

    Raises:
        ClickException: it has none, a line is none, or its clock goes back.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"{path}: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            span = parse(Span, json.loads(line))
        except (ValueError, RecursionError) as error:
            raise click.ClickException(f"{path}, line {number}: {error}") from error
        if any(getattr(span, late) < getattr(span, early) for early, late in pairwise(_CLOCK)):
            raise click.ClickException(f"{path}, line {number}: its clock goes back")
        found.append(span)
    if not found:
        raise click.ClickException(f"{path}: no spans")
    return found
