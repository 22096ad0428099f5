"""How fast text is read: gzip-ed JSON lines, against `gzip -dc | wc -l` on the same file.

Prints one JSON line. `ratio` is the rate of `read_documents`, each document counted, over that of
the pipe, both the best of rounds in turn: other programs can only make a round slower. Documents
are of the prose that every Python has, of log-normal length, some of it not ASCII, with the keys
that web text comes with.

    python benchmarks/reading.py --size 1GB
"""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from benchmarks.shared import peak_rss_bytes, print_line
from common.documents import read_documents, sample_text
from common.units import parse_size

_BLOCK = 20_000_000
"""Bytes of text that are made; the rest repeats them, farther apart than gzip looks back."""


@click.command()
@click.option("--size", default="1GB", show_default=True, help="Of the text before compression.")
@click.option("--paragraphs", default=2, show_default=True, help="Of a document, the median.")
@click.option("--rounds", default=3, show_default=True, help="Runs of each kind, in turn.")
def main(size: str, paragraphs: int, rounds: int) -> None:
    """Run the comparison."""
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "text.jsonl.gz"
        text_bytes = write_text(path, parse_size(size), paragraphs)
        seconds: dict[str, list[float]] = {"gzip": [], "read": []}
        for _ in range(rounds):
            seconds["gzip"].append(timed(lambda: count_lines(path)))
            seconds["read"].append(timed(lambda: count_documents(path)))
        print_line(
            {
                "text_bytes": text_bytes,
                "compressed_bytes": path.stat().st_size,
                "documents": count_documents(path),
                "seconds_gzip": seconds["gzip"],
                "seconds_read": seconds["read"],
                "bytes_per_second": text_bytes / min(seconds["read"]),
                "ratio": min(seconds["gzip"]) / min(seconds["read"]),
                "peak_rss_bytes": peak_rss_bytes(),
                "cpus": len(os.sched_getaffinity(0)),
            }
        )


def write_text(path: Path, size: int, paragraphs: int) -> int:
    """Write so many bytes as gzip-ed lines, as `gzip` does by default, and return their number."""
    block = "".join(lines(paragraphs)).encode()
    written = 0
    with gzip.open(path, "wb", compresslevel=6) as file:
        while written < size:
            written += file.write(block)
    return written


def lines(paragraphs: int) -> Iterator[str]:
    """Yield JSON lines of a block."""
    prose, chosen, size = sample_text().split("\n"), random.Random(0), 0
    while size < _BLOCK:
        count = 1 + int(chosen.lognormvariate(0, 0.8) * (paragraphs - 1))
        text = "\n\n".join(chosen.choices(prose, k=count))
        if chosen.random() < 0.3:
            text = text.replace("the ", "“thé” ")
        facts = {"url": f"https://example.org/{size}", "score": chosen.random()}
        line = json.dumps({"text": text, "id": size, "meta": facts}, ensure_ascii=False) + "\n"
        size += len(line)
        yield line


def timed(work: Callable[[], int]) -> float:
    """Return the seconds of a run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def count_documents(path: Path) -> int:
    """Read a file as every command does."""
    return sum(1 for _ in read_documents(str(path)))


def count_lines(path: Path) -> int:
    """Count lines by other programs."""
    with subprocess.Popen(["gzip", "-dc", str(path)], stdout=subprocess.PIPE) as unpacked:
        counted = subprocess.run(
            ["wc", "-l"], stdin=unpacked.stdout, capture_output=True, check=True
        )
    return int(counted.stdout)


if __name__ == "__main__":
    main()
