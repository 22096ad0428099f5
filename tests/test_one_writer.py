"""One process writes an output, and replaces it whole, however it ends."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up_results
import pytest
from conftest import refused
from processes import ending, forked

import common.outputs
from common.errors import OutputError, TraceError
from common.lock import lock_file, locked, writer_of
from common.outputs import (
    changed_whole,
    drop_kept,
    exchange,
    kept_beside,
    recover,
    set_aside,
)
from common.provenance import PROVENANCE
from common.sealed import write_sealed
from gguf_export.bundle import Bundle, export
from gguf_export.commit import commit_file, finish_commit
from gguf_export.gpu_split import split
from gguf_export.settings import ExportConfig, SplitConfig
from pipeline.cluster_plan import plan_cluster
from pipeline.cluster_settings import ClusterConfig
from powerinfer_bridge.benchmark.run import bench
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.estimate.run import estimate
from powerinfer_bridge.estimate.settings import EstimateConfig
from powerinfer_bridge.verify.verification import verify
from predictor.artifact import PredictorArtifact
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.reporting.report import write_report
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig
from prosparse.settings import SparsityConfig
from prosparse.threshold_shift import shift
from report.page import write_page
from report.settings import ReportConfig
from results.bench import BENCH
from results.predictors import PREDICTORS

HOLDER = """
import sys, time
from pathlib import Path
from common.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
ROOT = Path(__file__).resolve().parents[1]


def contents(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file())
    kept = (path for path in found if path.name != PROVENANCE)
    return {str(path.relative_to(directory)): path.read_bytes() for path in kept}


@contextmanager
def holder(out: Path) -> Iterator[subprocess.Popen[str]]:
    """Let another process hold an output's lock."""
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_lock_whose_disk_is_gone_hides_no_error(tmp_path: Path) -> None:
    def gone(descriptor: int) -> None:
        os.closerange(descriptor, descriptor + 1)
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.lock.os.close", gone)
        with refused(OutputError, "what happened"), locked(tmp_path / "out"):
            raise OutputError("what happened", "do something")
    with locked(tmp_path / "out"):
        assert writer_of(tmp_path / "out") is None


def test_a_second_writer_is_told_of_the_first(
    model_dir: Path, data_file: Path, exact_dir: Path, traces: TraceStore, tmp_path: Path
) -> None:
    out = tmp_path / "o" / "m.powerinfer.gguf"
    writers: list[Callable[[], object]] = [
        lambda: collect(
            CollectConfig(model=str(model_dir), data=(str(data_file),), out=out, tokens=9)
        ),
        lambda: train_predictors(TrainConfig(traces=traces.path, out=out, rank=32)),
        lambda: export(ExportConfig(model=str(model_dir), predictors=exact_dir, out=out)),
    ]
    with holder(out) as process:
        said = writer_of(out)
        assert said is not None
        for write in writers:
            parts = (f"being written by pid {process.pid} on ", " since 20", "wait for it")
            with refused(OutputError, str(out), *parts):
                write()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert lock_file(out).exists(), "of a killed process"
        assert writer_of(out) is None
    export(ExportConfig(model=str(model_dir), predictors=exact_dir, out=out))
    assert not lock_file(out).exists()
    assert verify(out).ok


def test_every_command_that_writes_is_refused_what_another_writes(
    model_dir: Path, exact_bundle: Bundle, text_file: Path, tmp_path: Path
) -> None:
    file, out = exact_bundle.model_file, tmp_path / "out"
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / BENCH.name).write_text(json.dumps(made_up_results.bench()))
    results = (tmp_path / "results",)
    settings: dict[str, Any] = {"model": str(model_dir), "data": str(text_file)}
    writers: dict[Path, list[Callable[[], object]]] = {
        file: [lambda: split(SplitConfig(file=file, vram_budget="1GiB"))],
        out: [
            lambda: bench(BenchConfig(file=file, data=str(text_file), out=out)),
            lambda: estimate(EstimateConfig(file=file, hardware="h100", density=0.1, out=out)),
            lambda: plan_cluster(
                ClusterConfig(model=str(model_dir), cluster="2xh100", rank=32, out=out)
            ),
            lambda: shift(SparsityConfig(**settings, max_ppl_gap=0.1, out=out)),
            lambda: write_page(ReportConfig(directories=results, out=out)),
            lambda: write_report(out, PREDICTORS.read(_reported(tmp_path)), draw=lambda *_: None),
        ],
    }
    for place, each in writers.items():
        with locked(place):
            for write in each:
                with refused(OutputError, f"{place}: is being written by pid {os.getpid()}"):
                    write()
    assert not out.exists()


def _reported(directory: Path) -> Path:
    (directory / PREDICTORS.name).write_text(json.dumps(made_up_results.predictor_report()))
    return directory


def test_a_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()


def test_a_link_and_what_it_leads_to_are_one_output(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with (
        locked(tmp_path / "link"),
        refused(OutputError, "being written by"),
        locked(tmp_path / "disk"),
    ):
        pass


def test_readers_are_told_that_it_is_not_finished_yet(traces: TraceStore, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(traces.path, tmp_path / "traces"))
    store = TraceStore.open(copy)
    store._commit(complete=False)
    with holder(copy) as process:
        with refused(TraceError, str(copy), f"is being written by pid {process.pid}", "wait"):
            store.require_complete()
        config = TrainConfig(traces=copy, out=tmp_path / "out", rank=32)
        with refused(TraceError, "is being written by"):
            train_predictors(config)
    with refused(TraceError, "--resume"):
        store.require_complete()


def test_a_reader_in_use_mixes_no_two_collections(
    ranked_traces: TraceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = (
        Path(shutil.copytree(ranked_traces.path, tmp_path / name)) for name in ("t", "new")
    )
    store = TraceStore.open(other)
    shard = store.progress.shards[0]
    store._commit(shards=(replace(shard, text_sha256="0" * 64), *store.progress.shards[1:]))
    real = TraceStore.layer

    def layer(self: TraceStore, number: int, *device: Any) -> Any:
        if number == 1:  # as `collect --force` ends beside a training
            exchange(other, here)
        return real(self, number, *device)

    monkeypatch.setattr(TraceStore, "layer", layer)
    config = TrainConfig(traces=here, out=tmp_path / "p", rank=32, recipe="svd")
    with refused(TraceError, str(here), "was replaced while it was read", "start again"):
        train_predictors(config)


@pytest.fixture
def wanted(model_dir: Path, data_file: Path, tmp_path: Path) -> CollectConfig:
    return CollectConfig(
        model=str(model_dir), data=(str(data_file),), out=tmp_path / "t", tokens=500, force=True
    )


def test_a_forced_collection_that_fails_keeps_the_old_traces_and_goes_on(
    wanted: CollectConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect(wanted)
    before, other = contents(wanted.directory), replace(wanted, tokens=900, shard_rows=200)
    real, made = TraceStore._commit, []

    def fail(self: TraceStore, **progress: Any) -> None:
        if len(progress.get("shards", ())) == 2:
            raise KeyboardInterrupt
        made.append(self.path)
        real(self, **progress)

    monkeypatch.setattr(TraceStore, "_commit", fail)
    with pytest.raises(KeyboardInterrupt):
        collect(other)
    assert contents(wanted.directory) == before
    assert made[-1] != wanted.out
    monkeypatch.setattr(TraceStore, "_commit", real)
    store = collect(replace(other, force=False, resume=True))
    assert (store.path, store.rows) == (wanted.out, 900)
    assert not any(path.name.startswith(".") for path in wanted.directory.parent.iterdir())
    again = collect(replace(other, out=wanted.directory.with_name("u")))
    assert contents(again.path) == contents(store.path)


def test_new_thresholds_come_all_at_once(
    ranked_traces: TraceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(
        traces=ranked_traces.path, out=tmp_path / "p", rank=32, recipe="svd", ffn_bytes=0.45
    )
    train_predictors(config)
    before, real = contents(config.out), PredictorArtifact._save

    def fail(self: PredictorArtifact, file: Path, tensors: Any) -> None:
        if file.name == "layer-01.safetensors":
            raise KeyboardInterrupt
        real(self, file, tensors)

    monkeypatch.setattr(PredictorArtifact, "_save", fail)
    with pytest.raises(KeyboardInterrupt):
        train_predictors(replace(config, resume=True, ffn_bytes=0.6))
    assert contents(config.out) == before
    PredictorArtifact.open(config.out).layer(0)
    monkeypatch.setattr(PredictorArtifact, "_save", real)
    made = train_predictors(replace(config, resume=True, ffn_bytes=0.6))
    fresh = train_predictors(replace(config, out=tmp_path / "q", ffn_bytes=0.6))
    assert contents(made.path) == contents(fresh.path)
    assert {path.name for path in tmp_path.iterdir()} == {"p", "q"}


def test_predictors_are_replaced_when_all_layers_are_there(
    ranked_traces: TraceStore, tmp_path: Path
) -> None:
    config = TrainConfig(traces=ranked_traces.path, out=tmp_path / "p", rank=32, recipe="svd")
    old = contents(train_predictors(config).path)
    part = train_predictors(replace(config, force=True, seed=1, layers=(0,)))
    assert (part.complete, contents(config.out)) == (False, old)
    whole = train_predictors(replace(config, resume=True, seed=1))
    assert (whole.path, whole.complete) == (config.out, True)
    assert contents(config.out) != old
    assert {path.name for path in tmp_path.iterdir()} == {"p"}


@pytest.mark.parametrize("at_once", [True, False])
def test_directories_are_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if not at_once:
        monkeypatch.setattr(common.outputs, "_exchanged", lambda one, other: False)
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "is").write_text(name)
    exchange(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "is").read_text() == "new"


@pytest.mark.parametrize("renames", [0, 1])
def test_an_exchange_in_two_steps_that_was_killed_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    monkeypatch.setattr(common.outputs, "_exchanged", lambda one, other: False)
    real, done = os.rename, list[object]()

    def rename(*paths: Any) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(paths)
        real(*paths)

    out = tmp_path / "out"
    out.mkdir()
    (out / "is").write_text("old")
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt), changed_whole(out) as new:
        (new / "is").write_text("new")
    monkeypatch.setattr(os, "rename", real)
    recover(out)
    assert (out / "is").read_text() == ("old" if renames == 0 else "new")
    with changed_whole(out) as new:
        (new / "is").write_text("newer")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert (out / "is").read_text() == "newer"


def test_what_must_be_written_in_place_keeps_the_old_one_beside(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in range(3):  # the second and third replace what a killed run began
        out.mkdir()
        (out / "is").write_text(f"{number}")
        set_aside(out)
        assert not out.exists()
        assert (kept_beside(out) / "is").read_text() == "0"
    drop_kept(out)
    assert not any(tmp_path.iterdir())


def test_what_is_said_to_be_done_names_no_other_files(exact_bundle: Bundle, tmp_path: Path) -> None:
    file = Path(shutil.copy(exact_bundle.model_file, tmp_path))
    for numbers in ((6,), (-1,)):
        write_sealed(commit_file(file), {"moves": [], "removals": list(numbers)})
        with refused(OutputError, "names files that no export has", "remove it"):
            finish_commit(file)
    write_sealed(commit_file(file), {"moves": [str(tmp_path / "x")], "removals": []})
    with refused(OutputError, str(commit_file(file)), "remove it"):
        finish_commit(file)
    assert file.exists()


def test_a_lock_that_is_a_link_writes_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    lock_file(tmp_path / "out").symlink_to(tmp_path / "mine")
    with refused(OutputError, str(tmp_path / "out")), locked(tmp_path / "out"):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.fixture
def bundles(model_dir: Path, exact_dir: Path, tmp_path: Path) -> tuple[Bundle, Bundle, Path]:
    """Two exports that differ in all of their files, and other predictors."""
    other = Path(shutil.copytree(exact_dir, tmp_path / "predictors"))
    artifact = PredictorArtifact.open(other)
    for layer in range(2):
        stored = artifact.layer(layer)
        counts = None if stored.activation_counts is None else stored.activation_counts + 1
        tensors = {"fc1": stored.fc1 * 2, "fc2": stored.fc2, "activation_counts": counts}
        artifact._save(artifact._file(layer), {k: v for k, v in tensors.items() if v is not None})
    artifact.write_header()
    made = [
        export(ExportConfig(model=str(model_dir), predictors=each, out=tmp_path / name))
        for name, each in (("old/m.powerinfer.gguf", exact_dir), ("new/m.powerinfer.gguf", other))
    ]
    return made[0], made[1], other


def files(directory: Path) -> dict[str, bytes]:
    """Return what somebody who opens the export reads, but for what tells the time."""
    found = contents(directory)
    hidden = (name for name in found if "/." in f"/{name}" or name.endswith(".manifest.json"))
    for name in list(hidden):
        del found[name]
    return found


def export_until(steps: int, config: ExportConfig) -> bool:
    """Export in another process, killed when it has changed names so often; whether it was."""
    left = [steps]

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*given: Any, **named: Any) -> object:
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*given, **named)

        return call

    def work() -> None:
        for name in ("rename", "replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        export(config)

    ended = ending(forked(work))
    assert ended in (0, -signal.SIGKILL)
    return ended != 0


def test_an_export_killed_between_its_names_is_the_old_or_the_new_one(
    bundles: tuple[Bundle, Bundle, Path], model_dir: Path, tmp_path: Path
) -> None:
    old, new, predictors = bundles
    whole = [files(each.model_file.parent) for each in (old, new)]
    assert {name for name in whole[0] if whole[0][name] == whole[1][name]} == {
        "m.predictors/config.json"
    }
    outcomes, killed, steps = set(), True, 0
    while killed:
        here = Path(shutil.copytree(old.model_file.parent, tmp_path / f"here-{steps}"))
        out = here / "m.powerinfer.gguf"
        config = ExportConfig(model=str(model_dir), predictors=predictors, out=out, force=True)
        killed = export_until(steps, config)
        finish_commit(out)
        assert files(here) in whole, f"killed after {steps} steps"
        outcomes.add(whole.index(files(here)))
        assert not commit_file(out).exists()
        steps += 1
        assert steps < 100
    assert outcomes == {0, 1}
    assert steps > 8
