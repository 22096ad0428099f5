"""What `psp run` takes against the four commands in turn, on one model and its text.

Both go in processes of their own, in turn: the four commands one after the other, then `psp run`,
which also plans, verifies and reports. CPU seconds (user and system, of all processes) hang on the
machine's other work far less than the clock does. Prints one JSON line.

    python benchmarks/whole_run.py --model quickstart-out/model \
        --data quickstart-out/corpus/train.jsonl --eval-data quickstart-out/corpus/valid.txt
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from benchmarks.shared import print_line

_PSP = "from cli import main; main()"
Command = list[str]


@click.command()
@click.option("--model", required=True)
@click.option("--data", required=True)
@click.option("--eval-data", required=True)
@click.option("--tokens", default=50_000, show_default=True)
@click.option("--context", default=256, show_default=True)
@click.option("--rank", default=32, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(
    model: str,
    data: str,
    eval_data: str,
    tokens: int,
    context: int,
    rank: int,
    threads: int,
    rounds: int,
) -> None:
    """Run the comparison."""
    traced = ["--model", model, "--data", data, "--tokens", f"{tokens}", "--context", f"{context}"]
    threaded = ["--threads", f"{threads}"]

    def four(place: Path) -> list[Command]:
        traces, predictors = str(place / "traces"), str(place / "predictors")
        file = str(place / "export" / "model.powerinfer.gguf")
        trained = ["--traces", traces, "--rank", f"{rank}"]
        measured = ["--data", eval_data, "--ctx", f"{context}"]
        return [
            ["collect", *traced, "--out", traces, *threaded],
            ["train-predictor", *trained, "--out", predictors, *threaded],
            ["export-gguf", "--model", model, "--predictors", predictors, "--out", file],
            ["bench-powerinfer", file, *measured, *threaded],
        ]

    def whole(place: Path) -> list[Command]:
        rest = ["--eval-data", eval_data, "--rank", f"{rank}", "--out", str(place / "out")]
        return [["run", *traced, *rest, *threaded]]

    pairs = [(_measured(four), _measured(whole)) for _ in range(rounds)]
    ratios = [whole_cpu / four_cpu for (four_cpu, _), (whole_cpu, _) in pairs]
    print_line(
        {
            "four_commands": [_facts(*each) for each, _ in pairs],
            "psp_run": [_facts(*each) for _, each in pairs],
            "median_ratio_of_cpu_seconds": round(statistics.median(ratios), 3),
        }
    )


def _measured(commands: Callable[[Path], Sequence[Command]]) -> tuple[float, float]:
    """Run commands one after the other in a directory; return CPU seconds and seconds."""
    with TemporaryDirectory(prefix="whole-run-") as place:
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        for command in commands(Path(place)):
            subprocess.run(
                [sys.executable, "-c", _PSP, *command],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        seconds = time.monotonic() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, seconds


def _facts(cpu: float, seconds: float) -> dict[str, float]:
    return {"cpu_seconds": round(cpu, 2), "seconds": round(seconds, 2)}


if __name__ == "__main__":
    main()
