"""Trace stores: interrupted and killed runs, refused outputs, damaged files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TRACE_CONTEXT, TRACE_TOKENS, ModelMaker, refused
from safetensors.torch import load_file, save_file

from common.errors import DataError, OutputError, TraceError
from predictor.collect import CollectConfig, collect
from predictor.traces import TraceStore

TOKENS, CONTEXT = TRACE_TOKENS, TRACE_CONTEXT
# Runs a collection that is killed at its n-th rename, or (n = 0) in the middle of a write.
KILLED = """
import os, resource, signal, sys
from pathlib import Path
import torch
import predictor.collect
from predictor.collect import CollectConfig, collect

model, data, out, tokens, context, renames = sys.argv[1:]
torch.set_num_threads(1)
predictor.collect._SHARD_BYTES = 1
left, replace = int(renames), os.replace

def replace_or_die(*paths):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)

os.replace = replace_or_die
if left == 0:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
collect(CollectConfig(
    model=model, data=data, out=Path(out), field="body", tokens=int(tokens), context=int(context)))
"""


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Close shards after 1,024 rows, the least there is; a tiny model would fill none."""
    monkeypatch.setattr("predictor.collect._SHARD_BYTES", 1)


Settings = Callable[..., CollectConfig]


@pytest.fixture
def copy(traces: TraceStore, tmp_path: Path) -> Path:
    """Return a copy of the traces that a test may damage."""
    return Path(shutil.copytree(traces.path, tmp_path / "copy"))


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def interrupt_after(commits: int, monkeypatch: pytest.MonkeyPatch, run: CollectConfig) -> None:
    commit = TraceStore.commit

    def commit_or_stop(store: TraceStore, *arguments: Any) -> None:
        if len(store.progress.shards) == commits:
            raise InterruptedError("stopped by the test")
        commit(store, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TraceStore, "commit", commit_or_stop)
        with pytest.raises(InterruptedError, match="stopped by the test"):
            collect(run)


@pytest.mark.parametrize("commits", [0, 1, 2])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    traces: TraceStore,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    commits: int,
) -> None:
    out = tmp_path / "out"
    interrupt_after(commits, monkeypatch, settings(out))
    half = TraceStore.open(out)
    assert len(half.progress.shards) == commits
    with refused(TraceError, str(out), f"after {half.rows} rows", "psp collect ... --resume"):
        half.require_complete()
    collect(settings(out, resume=True))
    assert contents(out) == contents(traces.path)


@pytest.mark.parametrize(
    ("renames", "shards", "ending"),
    [(1, None, signal.SIGKILL), (8, 1, signal.SIGKILL), (0, 0, signal.SIGXFSZ)],
    ids=["before the first manifest", "between the layers of shard 1", "amid a write"],
)
def test_a_killed_run_resumes_to_the_same_bytes(
    traces: TraceStore,
    settings: Settings,
    tmp_path: Path,
    renames: int,
    shards: int | None,
    ending: signal.Signals,
) -> None:
    """Renames: the manifest, two weights, then two layers and a manifest for every shard."""
    run = settings(tmp_path / "out")
    arguments = (run.model, run.data, run.out, TOKENS, CONTEXT, renames)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -ending, done.stderr
    if shards is not None:
        assert len(TraceStore.open(run.out).progress.shards) == shards
    assert contents(run.out).keys() - contents(traces.path).keys(), "nothing was left half-written"
    collect(settings(run.out, resume=True))
    assert contents(run.out) == contents(traces.path)


def test_resume_of_nothing_starts_and_of_a_complete_run_changes_nothing(
    settings: Settings, tmp_path: Path
) -> None:
    run = settings(tmp_path / "out", tokens=200, resume=True)
    first = contents(collect(run).path)
    assert contents(collect(run).path) == first
    assert len(first) == 1 + 2 * 2


@pytest.mark.parametrize(
    ("key", "name", "value"),
    [
        ("tokens", "tokens", 2999),
        ("context", "context", 99),
        ("batch", "batch", 4),
        ("seed", "seed", 1),
        ("dtype", "input_dtype", "bfloat16"),
        ("field", "field", "text"),
        ("data", "data", "other.txt"),
    ],
)
def test_resume_with_other_settings_is_refused(
    settings: Settings, copy: Path, key: str, name: str, value: object
) -> None:
    before = contents(copy)
    with refused(TraceError, str(copy), name, repr(value), "same settings", "--force"):
        collect(settings(copy, resume=True, **{key: value}))
    assert contents(copy) == before


def test_resume_with_another_model_is_refused(
    make_model: ModelMaker, settings: Settings, model_dir: Path, copy: Path, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", seed=1)
    with refused(TraceError, str(copy), "model", str(other), "--force"):
        collect(settings(copy, resume=True, model=str(other)))
    edit_manifest(copy, lambda manifest: manifest["header"].update(model=str(other)))
    with refused(TraceError, str(copy), "model_fingerprint", "--force"):
        collect(settings(copy, resume=True, model=str(other)))


def test_an_existing_output_needs_force(settings: Settings, copy: Path) -> None:
    (copy / "stray").write_text("old")
    before = contents(copy)
    with refused(OutputError, f"{copy} exists", "--resume", "--force", "another --out"):
        collect(settings(copy))
    assert contents(copy) == before
    collect(settings(copy, tokens=200, force=True))
    assert TraceStore.open(copy).rows == 200
    assert not (copy / "stray").exists()


def test_a_directory_without_traces_is_refused(tmp_path: Path) -> None:
    with refused(TraceError, str(tmp_path / "manifest.json"), "No such file", "'psp collect'"):
        TraceStore.open(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_refused(copy: Path, version: object) -> None:
    edit_manifest(copy, lambda manifest: manifest.update(schema_version=version))
    with refused(TraceError, str(copy), f"version is {version!r}", "reads 1", "again"):
        TraceStore.open(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("header"),
        lambda manifest: manifest["header"].pop("d_ff"),
        lambda manifest: manifest["header"].update(extra=1),
        lambda manifest: manifest.update(progress=None),
    ],
    ids=["no header", "no d_ff", "extra key", "no progress"],
)
def test_a_damaged_manifest_is_refused(
    copy: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    edit_manifest(copy, change)
    with refused(TraceError, str(copy / "manifest.json"), "damaged", "collect the traces again"):
        TraceStore.open(copy)


@pytest.mark.parametrize("name", ["shard-00001", "weights"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage"])
def test_a_missing_or_damaged_file_is_named(copy: Path, name: str, damage: str) -> None:
    file = copy / "layer-01" / f"{name}.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] if damage == "truncated" else b"garbage")
    store = TraceStore.open(copy)
    store.layer(0)
    with refused(TraceError, str(file), "missing or damaged", "collect the traces again"):
        store.weights(1) if name == "weights" else store.layer(1)


@pytest.mark.parametrize("name", ["inputs", "active", "counts", "magnitude"])
@pytest.mark.parametrize("cut", [True, False], ids=["short", "absent"])
def test_a_shard_that_does_not_fit_the_manifest_is_named(copy: Path, name: str, cut: bool) -> None:
    file = copy / "layer-00" / "shard-00000.safetensors"
    tensors = load_file(file)
    whole = tensors.pop(name)
    if cut:
        tensors[name] = whole[1:].clone()
    save_file(tensors, file)
    with refused(TraceError, str(file), "has shape", "collect the traces again"):
        TraceStore.open(copy).layer(0)


def test_unreadable_text_costs_no_existing_store(
    settings: Settings, copy: Path, tmp_path: Path
) -> None:
    before = contents(copy)
    with refused(DataError, str(tmp_path / "gone.txt"), "check --data"):
        collect(settings(copy, data=str(tmp_path / "gone.txt"), force=True))
    assert contents(copy) == before
    with refused(DataError, str(tmp_path / "gone.txt")):
        collect(settings(tmp_path / "new", data=str(tmp_path / "gone.txt")))
    assert not (tmp_path / "new").exists()
