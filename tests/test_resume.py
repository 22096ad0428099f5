"""Interrupted and killed collections go on to the same bytes."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import refused
from processes import ending, forked, killed_at

from cli import main
from common.errors import TraceError
from common.provenance import PROVENANCE
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.traces.shard_file import ShardWriter
from predictor.traces.store import TraceStore
from predictor.traces.summary import trace_summary

TOKENS, CONTEXT, BATCH, SHARD_ROWS = 900, 100, 2, 300
Settings = Callable[..., CollectConfig]
Arm = Callable[[], None]


@pytest.fixture(scope="module")
def settings(narrow_model: Path, long_data: Path) -> Settings:
    """Make settings of a collection of three small shards."""

    def make(out: Path, **changes: Any) -> CollectConfig:
        chosen: dict[str, Any] = {
            "model": str(narrow_model),
            "data": str(long_data),
            "field": "body",
            "tokens": TOKENS,
            "context": CONTEXT,
            "batch": BATCH,
            "shard_rows": SHARD_ROWS,
        }
        return CollectConfig(out=out, **(chosen | changes))

    return make


@pytest.fixture(scope="module")
def traces(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> TraceStore:
    """Traces made in one go."""
    store = collect(settings(tmp_path_factory.mktemp("traces") / "whole"))
    assert len(store.progress.shards) == 3
    return store


def contents(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file())
    files = (path for path in found if path.name != PROVENANCE)  # of the time
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@contextmanager
def stopping_after(commits: int) -> Iterator[None]:
    """Expect a collection in this block, and stop it when so many shards are committed."""
    shard = TraceStore.shard

    def shard_or_stop(store: TraceStore, *arguments: Any) -> Any:
        if len(store.progress.shards) == commits:
            raise InterruptedError("stopped by the test")
        return shard(store, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TraceStore, "shard", shard_or_stop)
        with pytest.raises(InterruptedError, match="stopped by the test"):
            yield


# --- interrupted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("commits", [0, 1, 2])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    traces: TraceStore, settings: Settings, tmp_path: Path, commits: int
) -> None:
    out = tmp_path / "out"
    with stopping_after(commits):
        collect(settings(out))
    half = TraceStore.open(out)
    assert len(half.progress.shards) == commits
    with refused(TraceError, str(out), f"after {half.rows} rows", "psp collect ... --resume"):
        half.require_complete()
    half.check()
    assert trace_summary(half)["tokens"] == half.rows
    collect(settings(out, resume=True, weights="streamed"))
    assert contents(out) == contents(traces.path)


@pytest.mark.parametrize("appends", [1, 2, 7])
def test_a_run_stopped_amid_a_shard_leaves_nothing_half_written(
    traces: TraceStore,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    appends: int,
) -> None:
    out, left, append = tmp_path / "out", appends, ShardWriter.append

    def append_or_stop(writer: ShardWriter, *arguments: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        append(writer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", append_or_stop)
        with pytest.raises(KeyboardInterrupt):
            collect(settings(out))
    assert not list(out.rglob(".*"))
    collect(settings(out, resume=True))
    assert contents(out) == contents(traces.path)


def test_resume_of_nothing_starts_and_of_a_complete_run_changes_nothing(
    settings: Settings, tmp_path: Path
) -> None:
    run = settings(tmp_path / "out", tokens=200, resume=True)
    first = contents(collect(run).path)
    assert contents(collect(run).path) == first
    assert len(first) == 1 + 2 * 2


# --- killed --------------------------------------------------------------------------------------


def start(run: CollectConfig, arm: Arm = lambda: None) -> int:
    """Collect in a forked process; return its id."""

    def work() -> None:
        arm()
        collect(run)

    return forked(work)


def kill_after(run: CollectConfig, delay: float) -> int:
    child = start(run)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return ending(child)


def die_at(count: int, *events: str) -> Arm:
    """Kill this process just before its n-th file operation of some kinds, see sys.audit."""

    def arm() -> None:
        left = count

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in events and writes(event, arguments):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return arm


def writes(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an operation is of the store: reading is not, but the sync of a directory is."""
    return event != "open" or "/out" in str(arguments[0])


@pytest.fixture(scope="module")
def duration(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Return the seconds of an unbroken run in a forked process."""
    seconds = []
    for name in ("first", "second"):
        run = settings(tmp_path_factory.mktemp(name) / "out")
        before = time.perf_counter()
        assert ending(start(run)) == 0
        seconds.append(time.perf_counter() - before)
    return min(seconds)


def check_what_is_committed(out: Path) -> None:
    """A kill may cost what was not committed, and nothing else."""
    if (out / "manifest.json").exists():
        store = TraceStore.open(out)
        if store.progress.shards:
            store.check()


MOMENTS = 8


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_run_killed_at_a_random_moment_resumes_to_the_same_bytes(
    traces: TraceStore, settings: Settings, duration: float, tmp_path: Path, moment: int
) -> None:
    delay = duration * (moment + random.Random(moment).random()) / MOMENTS
    run, ended = settings(tmp_path / "out", resume=True), 0
    while ended == 0:  # it was done already: the machine is faster than a moment ago
        shutil.rmtree(run.out, ignore_errors=True)
        ended = kill_after(run, delay)
        delay *= 0.9
    assert ended == -signal.SIGKILL
    check_what_is_committed(run.directory)
    collect(run)
    assert contents(run.directory) == contents(traces.path)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_several_times_resumes_to_the_same_bytes(
    traces: TraceStore, settings: Settings, duration: float, tmp_path: Path, seed: int
) -> None:
    draw, run, kills = random.Random(seed), settings(tmp_path / "out", resume=True), 0
    while kills < 2:  # it was done before: the machine is faster than a moment ago
        shutil.rmtree(run.out, ignore_errors=True)
        duration, kills = duration * 0.9, 0
        while kills < 5 and kill_after(run, duration * draw.uniform(0.3, 0.6)):
            check_what_is_committed(run.directory)
            kills += 1
    assert ending(start(run)) == 0
    assert contents(run.directory) == contents(traces.path)


def test_a_run_killed_before_every_file_operation_resumes_to_the_same_bytes(
    traces: TraceStore, settings: Settings, tmp_path: Path
) -> None:
    """Of one operation more each time, so that the kills go through a shard and then the next."""
    run, operations = settings(tmp_path / "out", resume=True), ("open", "os.rename", "os.mkdir")
    committed: list[int] = []
    ended, count = -signal.SIGKILL, 0
    while ended == -signal.SIGKILL:
        count += 1
        ended = ending(start(run, die_at(count, *operations)))
        if (run.directory / "manifest.json").exists():
            committed.append(len(TraceStore.open(run.out).progress.shards))
    assert ended == 0
    assert committed == sorted(committed), "nothing committed is ever lost"
    assert set(committed) == {0, 1, 2, 3}
    assert count > 20
    assert contents(run.directory) == contents(traces.path)


@pytest.mark.parametrize(
    ("renames", "shards"),
    [(1, None), (2, 0), (4, 0), (6, 0), (7, 0), (9, 1), (10, 1), (13, 2), (14, 3)],
)
def test_a_run_killed_at_a_rename_resumes_to_the_same_bytes(
    traces: TraceStore, settings: Settings, tmp_path: Path, renames: int, shards: int | None
) -> None:
    """Renames: the manifest, two weights and it again, two layers and it a shard, it at the end."""
    run = settings(tmp_path / "out")
    assert ending(start(run, die_at(renames, "os.rename"))) == -signal.SIGKILL
    if shards is not None:
        assert len(TraceStore.open(run.out).progress.shards) == shards
    assert contents(run.directory).keys() - contents(traces.path).keys(), (
        "nothing was left half-written"
    )
    collect(settings(run.out, resume=True))
    assert contents(run.directory) == contents(traces.path)


def test_a_text_cut_behind_what_is_recorded_leaves_no_stray_file(
    settings: Settings, tmp_path: Path
) -> None:
    """A run killed in its second shard, then a text that ends after the first."""
    data, line = tmp_path / "text.jsonl", json.dumps({"body": "dog " * 15}) + "\n"
    run = settings(tmp_path / "out", data=str(data), resume=True)
    data.write_text(line * 100)
    assert ending(start(run, die_at(9, "os.rename"))) == -signal.SIGKILL
    (shard,) = TraceStore.open(run.out).progress.shards
    data.write_text(line * len({document for document, _ in shard.segments}))
    assert collect(run).rows == shard.rows
    unbroken = collect(settings(tmp_path / "unbroken", data=str(data)))
    assert contents(run.directory) == contents(unbroken.path)


def limit_files(size: int, handler: Any) -> Arm:
    def arm() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        signal.signal(signal.SIGXFSZ, handler)

    return arm


# The weights take 46 kB, the first shard of a layer 88 kB; its codes begin at 71 kB.
@pytest.mark.parametrize("size", [35_000, 50_000, 80_000], ids=["weights", "inputs", "codes"])
@pytest.mark.parametrize("killed", [True, False], ids=["killed", "refused"])
def test_a_run_that_ends_amid_a_write_resumes_to_the_same_bytes(
    traces: TraceStore,
    settings: Settings,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    size: int,
    killed: bool,
) -> None:
    run = settings(tmp_path / "out")
    ended = ending(start(run, limit_files(size, signal.SIG_DFL if killed else signal.SIG_IGN)))
    assert ended == (-signal.SIGXFSZ if killed else 1)
    left = [path for path in run.directory.rglob(".*") if path.stat().st_size]
    if killed:
        assert left, "nothing was left half-written"
    else:
        message = capfd.readouterr().err.splitlines()[-1]
        assert message.startswith(f"common.errors.OutputError: cannot write {run.out}/layer-0")
        assert message.endswith("raise the file size limit (ulimit -f) or choose another --out")
        assert not left
    assert TraceStore.open(run.out).rows == 0
    collect(settings(run.out, resume=True))
    assert contents(run.directory) == contents(traces.path)


@pytest.mark.parametrize("removals", [1, 2, 4, 6, 8, 9, 11])
def test_a_run_killed_while_it_replaces_a_store_resumes_to_the_same_bytes(
    traces: TraceStore, settings: Settings, tmp_path: Path, removals: int
) -> None:
    """Removed are a manifest, two layers' weights and three shards, and three directories."""
    run = settings(Path(shutil.copytree(traces.path, tmp_path / "out")), force=True)
    arm = die_at(removals, "os.remove", "os.rmdir")
    assert ending(start(run, arm)) == -signal.SIGKILL
    collect(settings(run.out, resume=True))
    assert contents(run.directory) == contents(traces.path)
    assert os.listdir(tmp_path) == ["out"], "the old store is gone"


def kill_command(command: list[str], part: Path, said: Path) -> None:
    """Run the command line in a forked process, killed a little after a file has appeared."""
    child = forked(lambda: main(command), prints_to=said)
    ended = killed_at(child, part.exists, random.Random(part.name).uniform(0, 0.05))
    assert ended == -signal.SIGKILL, said.read_text()
    assert "Traceback" not in said.read_text()


def test_the_command_killed_twice_resumes_to_the_same_bytes(
    traces: TraceStore, settings: Settings, psp: Callable[..., Result], tmp_path: Path
) -> None:
    run = settings(tmp_path / "out")
    TraceStore.create(run.out, traces.header)  # the command would fill no shard of the usual size
    inputs = ("--model", run.model, "--data", run.data, "--field", run.field, "--out", run.out)
    sizes = ("--tokens", TOKENS, "--context", CONTEXT, "--batch", BATCH)
    command = [str(word) for word in ("collect", *inputs, *sizes, "--threads", 1)]
    for shard in (0, 1):
        part = run.directory / f"layer-00/.shard-{shard:05d}.safetensors.part"
        kill_command([*command, "--resume"], part, tmp_path / "said")
        assert len(TraceStore.open(run.out).progress.shards) in (shard, shard + 1)
    before = contents(run.directory)
    assert psp(*command).exit_code == 1, "not without --resume"
    assert contents(run.directory) == before
    assert psp(*command, "--resume").exit_code == 0
    assert contents(run.directory) == contents(traces.path)
