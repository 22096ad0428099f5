"""What a Ray cluster on one machine costs, and what it survives.

Layers are synthetic, see `benchmarks.training`; one JSON line a run, with the seconds of training
alone. `overhead` trains in this process with a thread, then on clusters of one and more CPUs whose
workers have trained before; `kills` trains on three nodes and kills a worker, a node or the driver
at a random moment each time, goes on with `--resume`, and compares every file.

    python -m benchmarks.cluster overhead --layers 8 --d-model 256 --d-ff 1024 --tokens 20000
    python -m benchmarks.cluster kills --rounds 10
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
import psutil
import torch

from benchmarks.ray_nodes import Nodes, three_nodes
from benchmarks.shared import print_line
from benchmarks.training import SHARD_ROWS, batch, documents, header, planted_layer
from predictor.artifact import INDEX
from predictor.traces.rows import LayerWeights
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig

Sizes = tuple[int, int, int, int]
"""Layers, d_model, d_ff, tokens."""

_COMMAND = (sys.executable, "-c", "from cli import main; main()", "train-predictor")


def sized(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of the traces."""
    defaults = {"tokens": 2000, "d-ff": 256, "d-model": 64, "layers": 12}
    for name, default in defaults.items():
        command = click.option(f"--{name}", default=default, show_default=True)(command)
    return command


@click.group()
def main() -> None:
    """Measure training on a cluster."""
    torch.set_num_threads(1)


@main.command()
@sized
@click.option("--cpus", default=2, show_default=True, help="Of the larger cluster.")
def overhead(layers: int, d_model: int, d_ff: int, tokens: int, cpus: int) -> None:
    """Compare one process with clusters."""
    with prepared((layers, d_model, d_ff, tokens)) as traces:
        alone = seconds(traces, "alone", None)
        print_line({"workers": 0, "seconds": alone})
        for workers in (1, cpus):
            with cluster_of(workers):
                seconds(traces, f"warm-{workers}", "local")
                taken = seconds(traces, f"ray-{workers}", "local")
            print_line({"workers": workers, "seconds": taken, "relative": taken / alone})
            require_same(traces.with_name(f"ray-{workers}"), traces.with_name("alone"))


@main.command()
@sized
@click.option("--rounds", default=10, show_default=True)
@click.option("--seed", default=0, show_default=True)
def kills(layers: int, d_model: int, d_ff: int, tokens: int, rounds: int, seed: int) -> None:
    """Kill something at a random moment, as often as asked."""
    chosen = random.Random(seed)
    with prepared((layers, d_model, d_ff, tokens)) as traces, three_nodes() as nodes:
        seconds(traces, "alone", None)
        span = seconds(traces, "unbroken", nodes.address)
        for number in range(rounds):
            out = traces.with_name(f"round-{number}")
            victim = ("worker", "node", "driver")[number % 3]
            moment = chosen.uniform(0, span)
            during = survived(nodes, traces, out, victim, moment, chosen)
            require_same(out, traces.with_name("alone"))
            print_line({"victim": victim, "after": moment, "died": during, "same": True})
            nodes.fill()


def survived(
    nodes: Nodes, traces: Path, out: Path, victim: str, moment: float, chosen: random.Random
) -> str:
    """Train while something dies; return what did, "" if training or no worker was there any more.

    A driver that died is started again, with `--resume` if it had begun.
    """
    given = ["--ray", nodes.address, "--traces", traces, "--out", out, "--ffn-bytes", "0.5"]
    command = [*_COMMAND, *map(str, given), "--threads", "1"]
    died = ""
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
        resumed = ["--resume"] if (out / INDEX).exists() else []
        subprocess.run([*command, *resumed], stdout=subprocess.DEVNULL, check=True)
    elif process.returncode:
        raise click.ClickException(f"a dead {died} ended the command")
    return died


def is_worker(process: psutil.Process) -> bool:
    """Whether a process is at work on one of our tasks."""
    try:
        return list(process.cmdline()[:1]) == ["ray::_with_threads"]
    except psutil.Error:
        return False


def seconds(traces: Path, name: str, address: str | None) -> float:
    """Train beside the traces; return the seconds it took."""
    out, begun = traces.with_name(name), time.perf_counter()
    train_predictors(TrainConfig(traces=traces, out=out, ffn_bytes=0.5, ray=address))
    return time.perf_counter() - begun


def require_same(found: Path, expected: Path) -> None:
    """Refuse predictors of other bytes, and anything that was left beside them."""
    for file in expected.iterdir():
        other = found / file.name
        if file.name != "provenance.json" and other.read_bytes() != file.read_bytes():
            raise click.ClickException(f"{other} differs")
    if left := list(found.parent.glob(".*")):
        raise click.ClickException(f"{left[0]} was left")


@contextmanager
def cluster_of(cpus: int) -> Iterator[None]:
    """Let this process be connected to a cluster of its own."""
    import ray

    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    os.environ["RAY_AUTH_TOKEN"] = "0" * 64
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=place,
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def prepared(sizes: Sizes) -> Iterator[Path]:
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
