"""Kills, second writers, full disks, clocks and flipped bits at random: is anything lost?

    python -m benchmarks.soak --model DIR --data FILE --seconds 600

An unbroken run of every command is made first. Then, until the time is over, a command is killed
at a random instant and must leave the old result or the new one, whole; what goes on with it must
end in the bytes of the unbroken run, whatever the clock says. Two processes write one output at
once: one does, the other is refused. A disk is full at some moment: one line, nothing lost, and on
it goes when it has room again. One bit of one file is flipped, and whoever reads it must say so.
Prints JSON with counts; exit code 1 if anything was lost, damaged or not noticed.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

from benchmarks.soak_deeds import Soak
from benchmarks.soak_writers import Workshop

_DEEDS = {"kill": 3, "collide": 1, "fill": 1, "set_back": 1, "flip": 1}
"""How often each is done."""


@click.command()
@click.option("--model", required=True, help="A small checkpoint.")
@click.option("--data", required=True, help="Text.")
@click.option("--seconds", type=float, default=300.0, show_default=True, help="Time for rounds.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what happens when.")
@click.option("--only", multiple=True, help="Begin of a command's name; may be repeated.")
@click.option("--deed", multiple=True, type=click.Choice(list(_DEEDS)), help="Instead of all.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory; a temporary one if none.")
def main(
    model: str,
    data: str,
    seconds: float,
    seed: int,
    only: tuple[str, ...],
    deed: tuple[str, ...],
    out: Path | None,
) -> None:
    """Break commands at random until the time is over."""
    torch.set_num_threads(1)
    chance, begun = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory(dir=out) as place:
        # The user's own cache of hashes is none of the soak's.
        os.environ["PSP_CACHE_DIR"] = f"{place}/cache"
        writers = Workshop(model, data, Path(place)).writers(only)
        read = any(each.read is not None for each in writers)
        if "flip" in deed and not read:
            raise click.UsageError(f"nobody reads the bytes of {', '.join(only)}")
        deeds = deed or tuple(each for each in _DEEDS if read or each != "flip")
        soak = Soak(writers, chance)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            [name] = chance.choices(deeds, [_DEEDS[each] for each in deeds])
            getattr(soak, name)()
    document = {
        "seconds": round(time.monotonic() - begun, 1),
        "seed": seed,
        **dict(sorted(soak.counts.items())),
        "wrong": soak.wrong,
    }
    print(json.dumps(document, indent=1))
    sys.exit(1 if soak.wrong else 0)


if __name__ == "__main__":
    main()
