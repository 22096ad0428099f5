"""Rows that are made beside a model and written meanwhile: the same store, the same errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import refused

from architectures.checkpoint import Checkpoint
from common.errors import OutputError, TraceError
from common.overlap import Lanes
from predictor.collection.collect import collect, save_weights, trace_header
from predictor.collection.recorder import Recorder
from predictor.collection.row_maker import RowMaker
from predictor.collection.settings import CollectConfig
from predictor.collection.writing import Meanwhile
from predictor.traces.shard_file import ShardWriter
from predictor.traces.store import TraceStore


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what makes recording go the way of a GPU, with everything on the CPU."""

    def go() -> None:
        monkeypatch.setattr("predictor.collection.recorder.made_at_once", lambda device: False)

    return go


def settings(model: Path, data: Path, out: Path, **changes: Any) -> CollectConfig:
    values: dict[str, Any] = {"tokens": 1500, "context": 63, "shard_rows": 400, "batch": 3}
    return CollectConfig(model=str(model), data=str(data), out=out, **(values | changes))


def contents(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def spoil(monkeypatch: pytest.MonkeyPatch, part: str, places: slice) -> None:
    """Let some numbers of the second shard's second batch be infinite."""
    calls = []

    def spoilt(self: Any, layer: Any) -> Any:
        calls.append(layer)
        if len(calls) == 13:
            getattr(layer, part).view(-1)[places] = float("inf")
        return begin(self, layer)

    begin = RowMaker.begin
    monkeypatch.setattr(RowMaker, "begin", spoilt)


@pytest.mark.parametrize("bits", [0, 2, 4, 8])
def test_the_store_is_the_same(
    model_dir: Path, data_file: Path, tmp_path: Path, beside: Callable[[], None], bits: int
) -> None:
    plain = collect(settings(model_dir, data_file, tmp_path / "plain", importance_bits=bits))
    assert len(plain.progress.shards) > 2
    beside()
    other = collect(settings(model_dir, data_file, tmp_path / "other", importance_bits=bits))
    assert contents(other.path) == contents(plain.path)
    other.check()


def test_what_does_not_fit_is_refused_and_leaves_whole_shards(
    model_dir: Path,
    data_file: Path,
    tmp_path: Path,
    beside: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The residual of the second shard's second batch, as if the stored type overflowed."""
    beside()
    spoil(monkeypatch, "residual", slice(7, 8))
    config = settings(model_dir, data_file, tmp_path / "out")
    with refused(
        TraceError, "1 of", "residual values of a batch do not fit torch.float16 (largest inf"
    ):
        collect(config)
    check_interrupted(config.directory)


def test_activations_that_overflow_are_refused_by_what_writes(
    model_dir: Path,
    data_file: Path,
    tmp_path: Path,
    beside: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beside()
    spoil(monkeypatch, "product", slice(None))
    config = settings(model_dir, data_file, tmp_path / "out")
    with refused(TraceError, "the FFN's activations overflow torch.float32", "--device cpu"):
        collect(config)
    check_interrupted(config.directory)


def check_interrupted(path: Path) -> None:
    """Whole shards before the failure are kept, nothing of it is."""
    store = TraceStore.open(path)
    assert not store.progress.complete
    assert len(store.progress.shards) >= 1
    store.check()
    assert not list(path.rglob("*.part"))


def test_a_disk_that_refuses_is_told_and_the_run_goes_on_later(
    model_dir: Path,
    data_file: Path,
    tmp_path: Path,
    beside: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = collect(settings(model_dir, data_file, tmp_path / "whole"))
    beside()
    append, calls = ShardWriter.append, []

    def full(self: ShardWriter, batch: Any) -> None:
        calls.append(threading.current_thread())
        if len(calls) == 13:
            raise OutputError("no space left", "make some")
        append(self, batch)

    config = settings(model_dir, data_file, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", full)
        with refused(OutputError, "no space left"):
            collect(config)
    assert threading.main_thread() not in calls
    check_interrupted(config.directory)
    again = collect(settings(model_dir, data_file, tmp_path / "out", resume=True))
    assert contents(again.path) == contents(whole.path)


def test_a_shard_that_cannot_be_finished_takes_the_next_one_with_it(
    model_dir: Path,
    data_file: Path,
    tmp_path: Path,
    beside: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second shard of two layers fails; the third is never in its place."""
    beside()
    finish, failed = ShardWriter.finish, list[ShardWriter]()

    def refusing(self: ShardWriter) -> None:
        if "shard-00001" in self._file.name and not failed:
            failed.append(self)
            raise OutputError("no space left", "make some")
        finish(self)

    monkeypatch.setattr(ShardWriter, "finish", refusing)
    config = settings(model_dir, data_file, tmp_path / "out")
    with refused(OutputError, "no space left"):
        collect(config)
    assert len(TraceStore.open(config.out).progress.shards) == 1
    check_interrupted(config.directory)


def test_a_failure_that_shows_at_the_end_of_the_next_shard_holds_nobody_up(
    model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    """The next shard's thread waits for rows that will not come."""
    checkpoint = Checkpoint.open(str(model_dir))
    config = settings(model_dir, data_file, tmp_path / "out")
    store = TraceStore.create(config.out, trace_header(config, checkpoint, "none"))

    def fail() -> Any:
        raise OutputError("no space left", "make some")

    def write() -> None:
        with Meanwhile(store) as writing:
            with writing.shard([(0, 1)], "first") as sink:
                sink(0, fail)
            with writing.shard([(0, 1)], "second"):
                time.sleep(0.5)  # the first has failed, and the block asks nothing

    told: list[BaseException] = []

    def tell() -> None:
        try:
            write()
        except BaseException as error:
            told.append(error)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert [str(error) for error in told] == ["no space left; make some"]
    assert not store.progress.shards


def test_an_interrupted_recording_leaves_whole_shards(
    model_dir: Path,
    data_file: Path,
    tmp_path: Path,
    beside: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beside()
    run, calls = Recorder.run, []

    def interrupted(self: Recorder, *args: Any) -> None:
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        run(self, *args)

    monkeypatch.setattr(Recorder, "run", interrupted)
    config = settings(model_dir, data_file, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        collect(config)
    check_interrupted(config.directory)


def test_lanes_keep_their_order_and_stop_at_the_first_failure() -> None:
    done: dict[int, list[int]] = {0: [], 1: [], 2: []}
    with Lanes(2, 4) as lanes:
        for number in range(60):
            lanes.put(number % 3, partial(done[number % 3].append, number))
        lanes.wait()
    assert done == {lane: list(range(lane, 60, 3)) for lane in range(3)}

    def fail() -> None:
        raise OutputError("full", "make room")

    ran: list[int] = []
    with refused(OutputError, "full"), Lanes(1, 2) as lanes:
        lanes.put(0, fail)
        for number in range(10):
            lanes.put(0, partial(ran.append, number))
    assert not ran


def test_weights_read_ahead_are_the_same(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(model_dir))
    made = []
    for ahead in (False, True):
        config = settings(model_dir, data_file, tmp_path / str(ahead))
        store = TraceStore.create(config.out, trace_header(config, checkpoint, "none"))
        norms = save_weights(store, checkpoint, ahead=ahead)
        made.append((contents(store.path), {n: norm.tolist() for n, norm in norms.items()}))
    assert made[0] == made[1]
    assert len(made[0][1]) == 2
