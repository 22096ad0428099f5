"""Files damaged by structure through every reader of psp: an answer or one line, never more.

    python -m benchmarks.fuzz --count 20000 --seconds 600 --seed 0

Each reader runs in a process of its own with little memory to spare, so that what kills or hangs
one is counted and the others go on. It prints JSON with the counts of each format.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz_exports import EXPORTS
from benchmarks.fuzz_formats import FORMATS as MADE
from benchmarks.fuzz_formats import SECONDS, Format
from benchmarks.fuzz_mutations import STAND_INS, mutated
from benchmarks.fuzz_results import PAGES, RESULTS
from benchmarks.fuzz_runs import RUNS
from benchmarks.shared import own_bytes
from common.files import remove_output

FORMATS = MADE | RESULTS | EXPORTS | RUNS | PAGES
"""By name; those that take long to read are last."""

HANGING_SECONDS = 20.0
ALLOWED_BYTES = 512 << 20
COUNTED = ("inputs", "accepted", "refused", "tracebacks", "hangs", "allocations", "deaths")


def main() -> None:
    """Fuzz all formats, or those that are named, and print what happened.

    Each may take its part of the time that is left, so that slow ones have what quick ones left.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="inputs over all formats")
    parser.add_argument("--seconds", type=float, default=600.0, help="that all of it may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--keep", type=Path, help="directory for inputs that did not hold")
    given = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    ends = time.monotonic() + given.seconds
    for name in given.formats:
        left = len(given.formats) - len(found)
        seconds = (ends - time.monotonic()) / left
        found[name] = fuzz(
            name, -(-given.count // len(given.formats)), seconds, given.seed, given.keep
        )
    total = {key: sum(each[key] for each in found.values()) for key in COUNTED}
    print(json.dumps({"seed": given.seed, "total": total, "formats": found}, indent=1))


def fuzz(name: str, count: int, seconds: float, seed: int, keep: Path | None) -> dict[str, Any]:
    """Return the counts of one format, and what did not hold, a line of each kind.

    Args:
        name: of the format.
        count: inputs.
        seconds: after which no other is begun.
        seed: of the damages; input N of a seed is always the same.
        keep: directory for inputs that did not hold.
    """
    counts: dict[str, Any] = dict.fromkeys(COUNTED, 0) | {"found": {}}
    done = 0
    while done < count and seconds > 0:
        done, spent = _in_process(name, range(done, count), seconds, seed, counts, keep)
        seconds -= spent
    return counts


def _in_process(
    name: str, numbers: range, seconds: float, seed: int, counts: dict[str, Any], keep: Path | None
) -> tuple[int, float]:
    """Run inputs in a process until all are done, it dies or their time is over.

    Returns:
        The next input's number, and the seconds since the first.
    """
    here, there = multiprocessing.Pipe()
    # Without fork: what this process has mapped is no memory of the reader's.
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(there, name, numbers, seed, keep), daemon=True
    )
    process.start()
    there.close()
    number, waiting = numbers.start, 120.0  # imports and the valid file come first
    begun = time.monotonic()
    while number < numbers.stop and (number == numbers.start or _since(begun) < seconds):
        try:
            answered = here.poll(waiting)
            kind, line = here.recv() if answered else ("hangs", "no answer")
        except EOFError:
            answered, kind, line = False, "deaths", f"exit code {process.exitcode}"
        waiting = HANGING_SECONDS
        if kind == "ready":
            begun = time.monotonic()
            continue
        counts["inputs"] += 1
        counts[kind] += 1
        if kind not in ("accepted", "refused"):
            counts["found"].setdefault(f"{kind}: {line}", number)
        number += 1
        if not answered:
            break
    process.kill()
    process.join()
    return number, _since(begun)


def _since(begun: float) -> float:
    return time.monotonic() - begun


def _serve(there: Connection, name: str, numbers: range, seed: int, keep: Path | None) -> None:
    with tempfile.TemporaryDirectory() as made:
        directory, made_format = Path(made), FORMATS[name]
        made_format.read(made_format.make(directory))  # which imports what it takes
        limit = own_bytes() + ALLOWED_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        there.send(("ready", ""))
        for number in numbers:
            there.send(one(made_format, directory, seed, number, keep))


def one(
    each: Format, directory: Path, seed: int, number: int, keep: Path | None = None
) -> tuple[str, str]:
    """Damage one file of a format and read it.

    The first inputs put what is no such file at all in the place of each; see `STAND_INS`.

    Args:
        each: the format.
        directory: where its valid files are; they are again after it.
        seed: of the damages.
        number: of the input.
        keep: directory for an input that did not hold.

    Returns:
        What came of it, one of `COUNTED`, and a line about it.
    """
    random = Random(f"{seed} {number}")
    files = each.files(directory)
    which, stand_in = divmod(number, len(STAND_INS))
    file = files[which] if which < len(files) else random.choice(files)
    whole = file.read_bytes()
    file.unlink()  # an old one may still be mapped
    if which < len(files):
        STAND_INS[stand_in](file, whole)
    else:
        file.write_bytes(mutated(whole, file.suffix, random))
    try:
        kind, line = outcome(lambda: each.read(directory), each.seconds)
        if keep is not None and kind not in ("accepted", "refused") and which >= len(files):
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, keep / f"{seed}-{number}-{file.name}")
    finally:
        remove_output(file)
        file.write_bytes(whole)
    return kind, line


def outcome(read: Callable[[], object], allowed: float = SECONDS) -> tuple[str, str]:
    """Run a reader: one line with a remedy or an answer, in time and with little memory."""
    from common.errors import PspError

    begun, kind, line = time.monotonic(), "accepted", ""
    try:
        read()
    except PspError as error:
        kind, line = "refused", str(error)
        if "alloc" in line or "MemoryError" in line:
            kind = "allocations"
        elif error.remedy is None and "expected" not in line:
            kind, line = "tracebacks", f"no remedy: {line}"
    except MemoryError:
        kind, line = "allocations", _last_line()
    except Exception as error:
        kind, line = "tracebacks", f"{type(error).__name__} at {_last_line()}"
    if time.monotonic() - begun > allowed:
        return "hangs", f"{time.monotonic() - begun:.1f} s"
    return kind, line[:300]


def _last_line() -> str:
    """Return where in psp an exception passed last."""
    root = str(Path(__file__).parents[1])
    import sys

    frames = traceback.extract_tb(sys.exc_info()[2])
    ours = [frame for frame in frames if frame.filename.startswith(root)]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""


if __name__ == "__main__":
    main()
