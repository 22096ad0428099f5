"""Kills, second writers and flipped bits at random: is anything lost, or silently wrong?

    python -m benchmarks.soak --model DIR --data FILE --seconds 600

An unbroken run of every command is made first. Then, until the time is over, a command is killed
at a random instant and must leave the old result or the new one, whole; what goes on with it must
end in the bytes of the unbroken run. Two processes write one output at once: one does, the other is
refused. One bit of one file is flipped, and whoever reads it must say so. Prints JSON with counts;
exit code 1 if anything was lost, damaged or not noticed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import click
import torch
from tqdm import tqdm

from common.documents import read_text
from common.errors import PspError
from common.provenance import PROVENANCE
from common.sealed import SEAL
from gguf_export.bundle import Bundle, export
from gguf_export.commit import finish_commit
from gguf_export.manifest import MANIFEST, check_outputs
from gguf_export.settings import SUFFIX, ExportConfig
from predictor.artifact import PredictorArtifact
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig

_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FLIPS = 20
"""Bits flipped in a round."""

_PIECE = 500
"""Characters of a document."""

Files = dict[str, bytes]


def files(directory: Path) -> Files:
    """Return what readers see, but for what tells the time."""
    found = (path for path in directory.rglob("*") if path.is_file())
    names = ((path, str(path.relative_to(directory))) for path in found)
    return {
        name: path.read_bytes()
        for path, name in names
        if "/." not in f"/{name}" and not name.endswith((PROVENANCE, MANIFEST))
    }


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A command in one directory.

    Attributes:
        name: for counts.
        place: where it writes.
        old: makes what is there before, None where nothing is.
        write: the command.
        go_on: what a user runs after a kill.
        read: looks at what is there as the next reader would.
    """

    name: str
    place: Path
    old: Callable[[], object] | None
    write: Callable[[], object]
    go_on: Callable[[], object]
    read: Callable[[], object]


def writers(model: str, data: str, work: Path) -> list[Writer]:
    """Return every command in small, on inputs that are made first."""
    text, cut = read_text(data), work / "in" / "text.jsonl"
    cut.parent.mkdir(parents=True)
    pieces = (text[at : at + _PIECE] for at in range(0, 40 * _PIECE, _PIECE))
    cut.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    traces = CollectConfig(
        model=model,
        data=(str(cut),),
        out=work / "in" / "traces",
        tokens=1500,
        context=128,
        shard_rows=300,
        force=True,
    )
    bounded = TrainConfig(
        traces=collect(traces).path,
        out=work / "in" / "p",
        rank=32,
        recipe="svd",
        ffn_bytes=0.5,
        force=True,
    )
    predictors = [
        train_predictors(replace(bounded, out=work / "in" / f"p{seed}", seed=seed)).path
        for seed in (0, 1)
    ]
    return [
        *_collecting(replace(traces, out=work / "out" / "t" / "traces")),
        *_training(replace(bounded, out=work / "out" / "p" / "predictors")),
        _exporting(model, predictors, work / "out" / "e" / f"m{SUFFIX}"),
    ]


def _collecting(config: CollectConfig) -> Iterator[Writer]:
    def read() -> None:
        opened = TraceStore.open(config.out)
        opened.require_complete()
        for layer in opened.header.layers:
            opened.layer(layer)
            opened.weights(layer)

    older, again = replace(config, tokens=1800, seed=1), partial(collect, config)
    resumed = partial(collect, replace(config, force=False, resume=True))
    common: dict[str, Any] = {"place": config.out.parent, "write": again, "read": read}
    yield Writer(name="collect", old=None, go_on=resumed, **common)
    yield Writer(name="collect --force", old=partial(collect, older), go_on=again, **common)


def _training(config: TrainConfig) -> Iterator[Writer]:
    def read() -> None:
        opened = PredictorArtifact.open(config.out)
        opened.require_complete()
        for layer in range(opened.header.n_layers):
            opened.layer(layer)
            opened.curves(layer)

    def training(**changes: Any) -> Callable[[], object]:
        return partial(train_predictors, replace(config, **changes))

    again, resumed = training(), training(force=False, resume=True)
    common: dict[str, Any] = {"place": config.out.parent, "read": read}
    name, looser = "train-predictor", {"ffn_bytes": 0.7}
    yield Writer(name=name, old=None, write=again, go_on=resumed, **common)
    older = training(**looser, seed=1)
    yield Writer(name=f"{name} --force", old=older, write=again, go_on=again, **common)
    name, older = f"{name} --resume, another bound", training(**looser)
    yield Writer(name=name, old=older, write=resumed, go_on=resumed, **common)


def _exporting(model: str, predictors: list[Path], out: Path) -> Writer:
    def read() -> None:
        finish_commit(out)
        check_outputs(out, Bundle.beside(out).written)

    new, old = (
        partial(export, ExportConfig(model=model, predictors=each, out=out, force=True))
        for each in predictors
    )
    name = "export-gguf --force"
    return Writer(name=name, place=out.parent, old=old, write=new, go_on=new, read=read)


def in_child(work: Callable[[], object]) -> int:
    """Do something in a process of its own; return its number."""
    pid = os.fork()
    if pid:
        return pid
    torch.set_num_threads(1)
    # Its own lock is shared with all children: one that is killed as it draws would stop them all.
    tqdm.set_lock(RLock())
    status = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        work()
        status = 0
    except PspError:
        status = 2
    except BaseException:
        status = 3
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """Return a child's exit status, negative if a signal ended it."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


class Soak:
    """Counts, and what went wrong."""

    def __init__(self, every: list[Writer], chance: random.Random) -> None:
        """Make the unbroken results, and the old ones."""
        self._every, self._chance = every, chance
        self.counts, self.wrong = Counter[str](), list[str]()
        self._whole, self._old, self._seconds = {}, {}, {}
        for each in every:
            shutil.rmtree(each.place, ignore_errors=True)
            if each.old is not None:
                assert ended(in_child(each.old)) == 0, each.name
                self._old[each.name] = files(each.place)
            begun = time.monotonic()
            assert ended(in_child(each.write)) == 0, each.name
            self._seconds[each.name] = time.monotonic() - begun
            self._whole[each.name] = files(each.place)

    def _prepare(self, each: Writer) -> None:
        shutil.rmtree(each.place, ignore_errors=True)
        for name, data in self._old.get(each.name, {}).items():
            file = each.place / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)

    def _fail(self, what: str) -> None:
        self.wrong.append(what)
        print(what, file=sys.stderr)

    def kill(self) -> None:
        """Kill a command at a random instant, look at what is there, and go on."""
        each = self._chance.choice(self._every)
        self._prepare(each)
        pid = in_child(each.write)
        moment = self._chance.uniform(0, self._seconds[each.name])
        time.sleep(moment)
        with suppress(ProcessLookupError):
            os.kill(pid, self._chance.choice(_SIGNALS))
        status = ended(pid)
        self.counts["killed" if status else "ended before"] += 1
        self.counts[f"killed: {each.name}"] += status != 0
        where = f"{each.name}, killed after {moment:.3f} s"
        if each.name.startswith("export"):
            finish_commit(next(iter(each.place.glob(f"*{SUFFIX}")), each.place / "none"))
        found, old = files(each.place), self._old.get(each.name)
        if old is not None and found not in (old, self._whole[each.name]):
            self._fail(f"{where}: neither the old nor the new result")
        if ended(in_child(each.go_on)) != 0:
            self._fail(f"{where}: did not go on")
        elif files(each.place) != self._whole[each.name]:
            self._fail(f"{where}: went on to something else")
        left = [p.name for p in each.place.rglob("*") if p.name.startswith(".")]
        if left:
            self._fail(f"{where}: left {', '.join(left)}")

    def collide(self) -> None:
        """Let two processes write one output."""
        each = self._chance.choice(self._every)
        self._prepare(each)
        first = in_child(each.write)
        time.sleep(self._chance.uniform(0, self._seconds[each.name] / 2))
        second = in_child(each.write)
        statuses = sorted((ended(first), ended(second)))
        self.counts["collisions"] += 1
        self.counts["collisions: one refused"] += statuses == [0, 2]
        if statuses not in ([0, 0], [0, 2]):
            self._fail(f"{each.name}, two at once: ended with {statuses}")
        if files(each.place) != self._whole[each.name]:
            self._fail(f"{each.name}, two at once: damaged")

    def flip(self) -> None:
        """Flip bits of a whole result, one at a time."""
        each = self._chance.choice(self._every)
        shutil.rmtree(each.place, ignore_errors=True)
        if ended(in_child(each.write if each.old is None else each.go_on)) != 0:
            # Thresholds are chosen again for what is there.
            assert each.old is not None
            assert ended(in_child(each.old)) == 0
            assert ended(in_child(each.write)) == 0
        found = sorted(path for path in each.place.rglob("*") if path.is_file())
        known = [path for path in found if path.name not in (PROVENANCE,)]
        for _ in range(_FLIPS):
            file = self._chance.choice(known)
            whole = file.read_bytes()
            at = self._chance.randrange(len(whole))
            damaged = bytearray(whole)
            damaged[at] ^= 1 << self._chance.randrange(8)
            file.write_bytes(damaged)
            self.counts["bits flipped"] += 1
            try:
                each.read()
                if _harmless(file, whole, at):
                    self.counts["bits flipped: of a byte that nobody uses"] += 1
                else:
                    self._fail(f"{each.name}: {file.name}, byte {at}: not noticed")
            except PspError:
                self.counts["bits flipped: noticed"] += 1
            file.write_bytes(whole)


def _harmless(file: Path, whole: bytes, at: int) -> bool:
    """Whether a byte is white space between values of a document, or in the seal's own name."""
    line = whole[whole.rfind(b"\n", 0, at) + 1 : at + 1]
    near = whole[max(0, at - len(SEAL) - 2) : at + len(SEAL) + 2]
    return file.suffix == ".json" and (not line.strip() or SEAL.encode() in near)


@click.command()
@click.option("--model", required=True, help="A small checkpoint.")
@click.option("--data", required=True, help="Text.")
@click.option("--seconds", type=float, default=300.0, show_default=True, help="Time for rounds.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what happens when.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory; a temporary one if none.")
def main(model: str, data: str, seconds: float, seed: int, out: Path | None) -> None:
    """Break commands at random until the time is over."""
    torch.set_num_threads(1)
    chance, begun = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory(dir=out) as place:
        soak = Soak(writers(model, data, Path(place)), chance)
        deeds = (soak.kill, soak.kill, soak.kill, soak.collide, soak.flip)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            chance.choice(deeds)()
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
