"""What a Ray cluster on one machine costs, and what it survives.

`train` has synthetic layers, see `benchmarks.training`; `collect` a model and text that are given.
One JSON line a run. `overhead` does it in this process with a thread, then on clusters of one and
more CPUs; seconds on a cluster are those from the first item that a worker was sent, without the
start of workers. `kills` does it on three nodes and kills a worker, a node or the driver at a
random moment each time, goes on with `--resume`, and compares every file. `memory` collects several
amounts of tokens and tells the driver's peak beyond what it takes once all is imported. `asleep`
and `simulate` are `benchmarks.cluster_scaling`'s.

    python -m benchmarks.ray_cluster overhead train --layers 8 --d-model 256 --tokens 20000
    python -m benchmarks.ray_cluster kills train --rounds 10
    python -m benchmarks.ray_cluster overhead collect --model DIR --data FILE.jsonl --tokens 50000
    python -m benchmarks.ray_cluster kills collect --model DIR --data FILE.jsonl
    python -m benchmarks.ray_cluster memory --model DIR --data FILE.jsonl --tokens 50000
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import psutil
import torch

from benchmarks.cluster_scaling import asleep, simulate
from benchmarks.ray_nodes import Nodes, cluster_of, three_nodes
from benchmarks.shared import peak_rss_bytes, print_line
from benchmarks.training import SHARD_ROWS, batch, documents, header, planted_layer
from cluster.spans import Span
from cluster.watch import spans_heard
from predictor.collection.collect import collect
from predictor.collection.nodes import PIPELINED
from predictor.collection.settings import CollectConfig
from predictor.traces.rows import LayerWeights
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig

_COMMAND = (sys.executable, "-c", "from cli import main; main()")
_ACTORS = ("ray::WorkerActor", "ray::StageActor")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done.

    Attributes:
        command: name of the command.
        given: its options, but for `out` and `ray`.
        place: directory for its outputs.
    """

    command: str
    given: dict[str, Any]
    place: Path

    def run(self, name: str, address: str | None) -> tuple[float, list[Span]]:
        """Do it in this process; return the seconds it took, and every item's times."""
        out, spans, begun = self.place / name, list[Span](), time.time()
        given = self.given
        if address is None and given.get("weights") == PIPELINED:
            given = given | {"weights": "auto"}
        with spans_heard(spans.append):
            if self.command == "collect":
                collect(CollectConfig(out=out, ray=address, **given))
            else:
                train_predictors(TrainConfig(out=out, ray=address, **given))
        first = min((span.sent for span in spans), default=begun)
        return time.time() - first, spans

    def line(self, name: str, address: str) -> list[str]:
        """Return the command that does it in a process of its own."""
        given = {"out": self.place / name, "ray": address, "threads": 1, **self.given}
        options = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
        return [*_COMMAND, self.command, *options]

    def begun(self, name: str) -> bool:
        """Whether there is something to go on with."""
        index = {"collect": "manifest.json", "train-predictor": "predictors.json"}[self.command]
        return (self.place / name / index).exists()


@contextmanager
def training(layers: int, d_model: int, d_ff: int, tokens: int) -> Iterator[Job]:
    """Write traces of synthetic layers."""
    with prepared((layers, d_model, d_ff, tokens)) as traces:
        given = {"traces": traces, "ffn_bytes": 0.5}
        yield Job(command="train-predictor", given=given, place=traces.parent)


@contextmanager
def collecting(**given: Any) -> Iterator[Job]:
    """Make room for traces."""
    with tempfile.TemporaryDirectory() as directory:
        yield Job(command="collect", given=given, place=Path(directory))


def jobs(group: Callable[..., None], *options: Callable[..., Any]) -> click.Group:
    """Return commands that do one thing with either job."""

    def train(layers: int, d_model: int, d_ff: int, tokens: int, **given: Any) -> None:
        with training(layers, d_model, d_ff, tokens) as job:
            group(job, **given)

    def record(
        model: str, data: str, tokens: int, context: int, weights: str, **given: Any
    ) -> None:
        asked = {"model": model, "data": data, "tokens": tokens}
        with collecting(**asked, context=context, weights=weights) as job:
            group(job, **given)

    sizes = {"layers": 12, "d-model": 64, "d-ff": 256, "tokens": 2000}
    of_train = [click.option(f"--{n}", default=d, show_default=True) for n, d in sizes.items()]
    of_collect = [
        click.option("--model", required=True, help="Checkpoint directory."),
        click.option("--data", required=True, help="Text, several documents."),
        click.option("--tokens", default=20_000, show_default=True),
        click.option("--context", default=256, show_default=True),
        click.option("--weights", default="auto", show_default=True),
    ]
    found = click.Group(group.__name__, help=group.__doc__)
    for name, function, own in (("train", train, of_train), ("collect", record, of_collect)):
        command: Any = function
        for option in (*own, *options):
            command = option(command)
        found.add_command(click.command(name, help=group.__doc__)(command))
    return found


@click.group()
def main() -> None:
    """Measure work on a cluster."""
    torch.set_num_threads(1)


main.add_command(asleep)
main.add_command(simulate)


def overhead(job: Job, cpus: int, rounds: int) -> None:
    """Compare one process with clusters, in turn."""
    for number in range(rounds):
        alone, _ = job.run(f"alone-{number}", None)
        print_line({"workers": 0, "seconds": alone})
        for workers in (1, cpus):
            with cluster_of(workers):
                taken, spans = job.run(f"ray-{workers}-{number}", "local")
            print_line(
                {
                    "workers": workers,
                    "seconds": taken,
                    "relative": taken / alone,
                    "items": len(spans),
                    "busy": sum(span.ended - span.begun for span in spans) / (workers * taken),
                }
            )
            require_same(job.place / f"ray-{workers}-{number}", job.place / "alone-0")


def kills(job: Job, rounds: int, seed: int) -> None:
    """Kill something at a random moment, as often as asked."""
    chosen = random.Random(seed)
    with three_nodes() as nodes:
        job.run("alone", None)
        begun = time.monotonic()
        subprocess.run(job.line("unbroken", nodes.address), stdout=subprocess.DEVNULL, check=True)
        span = time.monotonic() - begun
        require_same(job.place / "unbroken", job.place / "alone")
        for number in range(rounds):
            victim = ("worker", "node", "driver")[number % 3]
            moment = chosen.uniform(0, span)
            during = survived(nodes, job, f"round-{number}", victim, moment, chosen)
            require_same(job.place / f"round-{number}", job.place / "alone")
            print_line({"victim": victim, "after": moment, "died": during, "same": True})
            nodes.fill()


main.add_command(
    jobs(
        overhead,
        click.option("--cpus", default=2, show_default=True, help="Of the larger cluster."),
        click.option("--rounds", default=1, show_default=True),
    )
)
main.add_command(
    jobs(
        kills,
        click.option("--rounds", default=10, show_default=True),
        click.option("--seed", default=0, show_default=True),
    )
)


@main.command()
@click.option("--model", required=True, help="Checkpoint directory.")
@click.option("--data", required=True, help="Text, several documents.")
@click.option("--tokens", required=True, multiple=True, type=int)
def memory(model: str, data: str, tokens: tuple[int, ...]) -> None:
    """Tell what a collection's driver takes beyond the imports."""
    with collecting(model=model, data=data, context=256, tokens=1000) as job, cluster_of(1):
        job.run("first", "local")
        before = peak_rss_bytes()
        for count in tokens:
            replace(job, given=job.given | {"tokens": count}).run(f"of-{count}", "local")
            print_line({"tokens": count, "extra_rss_bytes": peak_rss_bytes() - before})


def survived(
    nodes: Nodes, job: Job, name: str, victim: str, moment: float, chosen: random.Random
) -> str:
    """Do it while something dies; return what did, "" if it or its workers were gone by then.

    A driver that died is started again, with `--resume` if it had begun.
    """
    command, died = job.line(name, nodes.address), ""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        time.sleep(moment)
        workers: list[psutil.Process] = []
        while victim == "worker" and not workers and process.poll() is None:
            workers = [each for each in psutil.process_iter() if is_worker(each)]
        if process.poll() is None and victim == "driver":
            process.kill()
            died = "driver"
        elif process.poll() is None and victim == "node":
            nodes.kill(chosen)
            died = "node"
        elif workers:
            chosen.choice(workers).kill()
            died = "worker"
    if died == "driver":
        resumed = ["--resume"] if job.begun(name) else []
        subprocess.run([*command, *resumed], stdout=subprocess.DEVNULL, check=True)
    elif process.returncode:
        raise click.ClickException(f"a dead {died} ended the command")
    return died


def is_worker(process: psutil.Process) -> bool:
    """Whether a process is one of our workers."""
    try:
        return str(process.cmdline()[:1]).startswith(tuple(f"['{name}" for name in _ACTORS))
    except psutil.Error:
        return False


def require_same(found: Path, expected: Path) -> None:
    """Refuse results of other bytes, and anything that was left beside them."""
    for file in expected.rglob("*"):
        other = found / file.relative_to(expected)
        if not file.is_file() or file.name == "provenance.json":
            continue
        if other.read_bytes() != file.read_bytes():
            raise click.ClickException(f"{other} differs")
    if left := list(found.parent.glob(".*")):
        raise click.ClickException(f"{left[0]} was left")


@contextmanager
def prepared(sizes: tuple[int, int, int, int]) -> Iterator[Path]:
    """Write traces of synthetic layers, and remove them with all that lies beside."""
    layers, d_model, d_ff, tokens = sizes
    numbers = tuple(range(layers))
    made = replace(header(tokens), n_layers=layers, layers=numbers, d_model=d_model, d_ff=d_ff)
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        store = TraceStore.create(Path(temporary, "traces"), made)
        planted = [planted_layer(generator, d_model, d_ff) for _ in numbers]
        ones = torch.ones(d_ff)
        store.save_weights(
            (n, LayerWeights(layer["up"] @ layer["down"], ones)) for n, layer in enumerate(planted)
        )
        for first in range(0, tokens, SHARD_ROWS):
            rows = min(SHARD_ROWS, tokens - first)
            with store.shard(list(documents(first, rows)), str(first)) as writers:
                for number, layer in enumerate(planted):
                    writers[number].append(batch(layer, rows, generator))
        store.finish()
        yield store.path


if __name__ == "__main__":
    main()
