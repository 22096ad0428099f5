"""Traces in object stores: in fsspec's memory, and at a server of S3's protocol."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from click.testing import Result
from conftest import ModelMaker, refused
from processes import ending
from test_resume import start

from common.errors import OutputError, TraceError
from common.provenance import PROVENANCE
from common.scratch import PREFIX
from common.urls import Url, path_or_url
from pipeline.artifacts import describe
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.traces import objects
from predictor.traces.objects import Objects, _within
from predictor.traces.rows import LayerRows
from predictor.traces.shard_file import BatchRows, ShardWriter
from predictor.traces.staging import stage_shard, stage_weights
from predictor.traces.store import TraceStore, shard_layout
from predictor.traces.summary import check_traces, trace_summary
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig

Make = Callable[..., CollectConfig]
Psp = Callable[..., Result]


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where files lie on their way; nothing of them may stay."""
    place = tmp_path / "scratch"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert not list(place.glob(f"{PREFIX}*"))


@pytest.fixture
def memory() -> Iterator[Url]:
    """An empty bucket in this process's memory."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield Url("memory://bucket/some/traces")
    files.store.clear()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server of S3's protocol, the address of which the environment names."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.moto_server.threaded_moto_server")
    served = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    served.start()
    address = "http://{}:{}".format(*served.get_host_and_port())
    given = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "name",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield address
    served.stop()


@pytest.fixture
def s3(server: str, tmp_path: Path) -> Url:
    return Url(f"s3://bucket/{tmp_path.name}")


@pytest.fixture(scope="module")
def make(make_model: ModelMaker, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    model = make_model(tmp_path_factory.mktemp("objects") / "model", intermediate_size=96)

    def settings(out: Path | Url, **changes: Any) -> CollectConfig:
        sizes: dict[str, Any] = {"tokens": 900, "context": 64, "shard_rows": 400}
        sizes |= {"importance_bits": 8} | changes
        return CollectConfig(model=str(model), data=str(data_file), out=out, **sizes)

    return settings


@pytest.fixture(scope="module")
def local(make: Make, tmp_path_factory: pytest.TempPathFactory) -> TraceStore:
    store = collect(make(tmp_path_factory.mktemp("local") / "traces"))
    assert len(store.progress.shards) == 3
    return store


def contents(where: Path | Url) -> dict[str, bytes]:
    if isinstance(where, Path):
        files = (file for file in where.rglob("*") if file.is_file())
        return {file.relative_to(where).as_posix(): file.read_bytes() for file in files}
    files, root = fsspec.core.url_to_fs(where)
    files.invalidate_cache()
    return {path[len(root) + 1 :]: files.cat_file(path) for path in files.find(root)}


def put(url: Url, name: str, data: bytes) -> None:
    files, root = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{root}/{name}", data)


@contextmanager
def stopped_at(shard: int) -> Iterator[None]:
    """Expect a collection that is stopped amid a shard."""
    append = ShardWriter.append

    def append_or_stop(writer: ShardWriter, *arguments: Any) -> None:
        if f"shard-{shard:05d}" in str(writer._name):
            raise KeyboardInterrupt
        append(writer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "append", append_or_stop)
        with pytest.raises(KeyboardInterrupt):
            yield


# --- what a store is ------------------------------------------------------------------------------


def check_all(make: Make, local: TraceStore, url: Url, tmp_path: Path) -> None:
    """Everything that is promised of a store, from its making to predictors."""
    notes: list[str] = []
    store = collect(make(url), notes.append)
    assert contents(url) == contents(local.path)
    assert any("what is not uploaded yet needs at most" in note for note in notes)
    told = {"traces": str(url)}
    assert trace_summary(store) == trace_summary(local) | told
    assert check_traces(store) == check_traces(local) | told
    made = {}
    for name, where in (("near", local.path), ("far", url)):
        out = tmp_path / name
        train_predictors(TrainConfig(traces=where, out=out, ffn_bytes=0.5))
        made[name] = contents(out)
    assert made["near"] == made["far"]


def test_a_store_and_what_is_trained_from_it_are_those_of_a_directory(
    make: Make, local: TraceStore, memory: Url, tmp_path: Path
) -> None:
    check_all(make, local, memory, tmp_path)


def test_so_they_are_at_a_server(make: Make, local: TraceStore, s3: Url, tmp_path: Path) -> None:
    check_all(make, local, s3, tmp_path)


def check_resumed(make: Make, local: TraceStore, url: Url) -> None:
    with stopped_at(1):
        collect(make(url))
    half = TraceStore.open(url)
    assert len(half.progress.shards) == 1
    with refused(TraceError, url, "interrupted", "--resume"):
        half.require_complete()
    put(url, ".parts-dead/shard-00001", b"of a killed run")
    put(url, "layer-00/shard-00007.safetensors", b"of one with more tokens")
    collect(make(url, resume=True))
    assert contents(url) == contents(local.path)


def test_an_interrupted_run_is_gone_on_with(make: Make, local: TraceStore, memory: Url) -> None:
    check_resumed(make, local, memory)


def test_so_it_is_at_a_server(make: Make, local: TraceStore, s3: Url) -> None:
    check_resumed(make, local, s3)


def test_a_run_that_is_killed_is_gone_on_with(make: Make, local: TraceStore, s3: Url) -> None:
    def arm() -> None:
        kind = fsspec.get_filesystem_class("s3")
        put, left = kind._put_file, [9]  # amid the second shard

        async def put_or_die(self: Any, *arguments: Any, **options: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            await put(self, *arguments, **options)

        pytest.MonkeyPatch().setattr(kind, "_put_file", put_or_die)

    assert ending(start(make(s3), arm)) == -signal.SIGKILL
    assert len(TraceStore.open(s3).progress.shards) == 1
    collect(make(s3, resume=True))
    assert contents(s3) == contents(local.path)


def test_rows_that_threads_write_are_the_same(
    make: Make, local: TraceStore, memory: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("predictor.collection.recorder.made_at_once", lambda device: False)
    collect(make(memory))
    assert contents(memory) == contents(local.path)


def check_adopted(local: TraceStore, url: Url) -> None:
    """What workers of a cluster do, and the process that counts it."""
    place = Objects(url)
    store, parts = TraceStore.create(url, local.header), place.parts()
    layers = local.header.layers
    store.adopt_weights([stage_weights(parts, n, local.weights(n)) for n in layers])
    rows = {layer: local.layer(layer).pieces for layer in layers}
    for number, shard in enumerate(local.progress.shards):
        layout = shard_layout(local.header, shard.rows)
        with stage_shard(parts, number, layers, layout) as (writers, made):
            for layer, writer in writers.items():
                writer.append(batch_of(rows[layer][number]))
        store.adopt(shard.segments, shard.text_sha256, made)
    done = local.progress
    store.finish(skipped_rows=done.skipped_rows, model_files=done.model_files)
    assert contents(url) == contents(local.path)


def batch_of(piece: LayerRows) -> BatchRows:
    return BatchRows(piece.inputs, piece.active, piece.counts, piece.scale, piece.importance)


def test_what_workers_write_is_moved_within_the_store(local: TraceStore, memory: Url) -> None:
    check_adopted(local, memory)


def test_so_it_is_by_a_server(local: TraceStore, s3: Url) -> None:
    check_adopted(local, s3)


def test_commands_make_and_show_it(psp: Psp, make: Make, memory: Url, tmp_path: Path) -> None:
    config = make(memory)
    options = ["--model", config.model, "--data", str(config.data), "--tokens", "200"]
    assert psp("collect", *options, "--out", memory).exit_code == 0
    assert PROVENANCE in contents(memory)
    assert "200 tokens" in psp("traces", "check", memory).stdout
    assert "layer" in psp("traces", "info", memory).stdout
    shown = psp("inspect", memory).stdout
    assert "made with" in shown
    assert describe(memory).sealed
    both = psp("inspect", memory, memory)
    assert both.exit_code == 2
    assert "not compared" in both.stderr


# --- what is refused ------------------------------------------------------------------------------


def test_what_is_there_is_not_replaced(make: Make, memory: Url) -> None:
    put(memory, "other.txt", b"mine")
    for changes in ({}, {"force": True}, {"resume": True}):
        with refused(OutputError, memory, "holds 1 objects already", "remove them"):
            collect(make(memory, **changes))
    assert contents(memory) == {"other.txt": b"mine"}


def test_of_two_that_begin_a_store_one_is_refused(local: TraceStore, memory: Url) -> None:
    TraceStore.create(memory, local.header)
    with refused(OutputError, f"{memory}/manifest.json"):
        TraceStore.create(memory, local.header)


def test_so_it_is_by_the_server(local: TraceStore, s3: Url) -> None:
    TraceStore.create(s3, local.header)
    with refused(OutputError, f"{s3}/manifest.json"):
        TraceStore.create(s3, local.header)


SHARD, WEIGHTS = "layer-01/shard-00001.safetensors", "layer-01/weights.safetensors"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (SHARD, lambda data: data[:-1] + bytes([data[-1] ^ 1]), "header and data do not fit"),
        (SHARD, lambda data: data[:500], "damaged, or of other sizes"),
        (SHARD, lambda data: data[:8] + b"[" * 1016 + data[1024:], "damaged"),
        (SHARD, lambda data: data[:1030] + b"\xff" + data[1031:], "damaged"),
        (SHARD, lambda data: data[:-8], "missing or damaged"),
        (SHARD, None, "no such bucket or object"),
        (WEIGHTS, lambda data: data[:-1] + bytes([data[-1] ^ 1]), "checksum differs"),
        ("manifest.json", None, "no such bucket or object"),
    ],
)
def test_what_is_damaged_is_named(
    local: TraceStore,
    memory: Url,
    tmp_path: Path,
    name: str,
    change: Callable[[bytes], bytes] | None,
    said: str,
) -> None:
    for each, data in contents(local.path).items():
        if each != name:
            put(memory, each, data)
        elif change is not None:
            put(memory, each, change(data))
    with refused(TraceError, memory, said):
        train_predictors(TrainConfig(traces=memory, out=tmp_path / "p", rank=32, jobs=1))


def test_a_shard_of_another_collection_is_named(local: TraceStore, memory: Url) -> None:
    for name, data in contents(local.path).items():
        put(memory, name, data)
    store = TraceStore.open(memory)
    first, second, third = store.progress.shards
    store._commit(shards=(first, replace(second, sha256="0" * 64), third))
    with refused(TraceError, memory, "shard 1 is whole but not the manifest's"):
        store.require_complete()


def test_no_more_of_a_document_is_fetched_than_is_enough_to_refuse_it(
    memory: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(memory, "manifest.json", bytes(1000))
    monkeypatch.setattr(objects, "LARGEST_DOCUMENT", 100)
    with Objects(memory).document("manifest.json") as file:
        assert file.stat().st_size == 101


def test_a_store_that_is_replaced_meanwhile_is_named(local: TraceStore, memory: Url) -> None:
    for name, data in contents(local.path).items():
        put(memory, name, data)
    store = TraceStore.open(memory)
    other = TraceStore.open(memory)
    other._commit(complete=False)
    with refused(TraceError, memory, "was replaced while it was read"):
        store.layer(0)


def test_a_scratch_directory_that_is_too_small_is_told_before(
    make: Make, local: TraceStore, memory: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, data in contents(local.path).items():
        put(memory, name, data)
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1000))
    with refused(OutputError, "reading 2 of its layers at once needs", "set TMPDIR"):
        train_predictors(TrainConfig(traces=memory, out=tmp_path / "p", rank=32, jobs=2))
    elsewhere = Url("memory://bucket/elsewhere")
    with refused(OutputError, "what is not uploaded yet needs", "set TMPDIR"):
        collect(make(elsewhere))
    assert contents(elsewhere) == {}


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3:/b//c://", "no place in an object store"),
        ("s3://", "no place in an object store"),
        ("s3://b/../c", "no place in an object store"),
        ("simplecache::s3://b/c", "no place in an object store"),
        ("file:///tmp/x", "on a disk"),
    ],
)
def test_a_url_that_names_no_object_store_is_refused(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        path_or_url(url)


def test_a_password_is_not_repeated(psp: Psp) -> None:
    told = psp("traces", "info", "s3://name:hidden@bucket/x")
    assert told.exit_code == 2
    assert "credentials" in told.stderr
    assert "hidden" not in told.stderr + told.stdout


def test_only_traces_lie_in_object_stores(psp: Psp, local: TraceStore) -> None:
    told = psp("train-predictor", "--traces", str(local.path), "--out", "s3://bucket/p")
    assert told.exit_code == 2
    assert "only traces may lie in an object store" in " ".join(told.stderr.split())


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("foo://bucket/x", ("Protocol not known: foo",)),
        ("gs://bucket/x", ("a library is missing", "pip install 'gcsfs'")),
        ("s3://bucket/x", ("a library is missing", "pip install 'psp[s3]'")),
    ],
)
def test_a_library_that_is_missing_is_named(
    make: Make, url: str, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(protocol: str, *arguments: Any) -> Any:
        if protocol == "foo":
            return known(protocol)
        raise ImportError("Install it to access that")

    known = fsspec.get_filesystem_class
    monkeypatch.setattr(fsspec.core, "get_filesystem_class", absent)
    with refused(OutputError, url, *parts):
        collect(make(Url(url)))
    with refused(TraceError, url, *parts):
        TraceStore.open(Url(url))


def test_a_bucket_that_is_not_there_is_named(make: Make, server: str) -> None:
    nowhere = Url("s3://nobody/x")
    with refused(OutputError, nowhere, "no such bucket or object"):
        collect(make(nowhere))
    with refused(TraceError, nowhere, "no such bucket or object"):
        TraceStore.open(nowhere)


def test_other_credentials_are_refused_and_not_told(
    make: Make, s3: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)
    with refused(OutputError, s3, "Access Key Id", "credentials in the library's environment"):
        collect(make(s3))
    with refused(TraceError, s3, "Forbidden", "credentials in the library's environment"):
        TraceStore.open(s3)


def test_a_port_of_nobody_is_told(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = fsspec.get_filesystem_class("s3")
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://name:hidden@127.0.0.1:{port}")
    monkeypatch.setattr(objects, "_SECONDS", 1)
    monkeypatch.setattr(kind, "retries", 1)
    kind.clear_instance_cache()
    url = Url("s3://bucket/x")
    with pytest.raises(TraceError, match=f"{url}: .*check bucket, network") as told:
        TraceStore.open(url)
    assert "hidden" not in str(told.value)
    kind.clear_instance_cache()


def test_who_does_not_answer_is_not_waited_for(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = fsspec.get_filesystem_class("s3")
    monkeypatch.setattr(objects, "_SECONDS", 0.5)
    kind.clear_instance_cache()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        for write, error in ((True, OutputError), (False, TraceError)):
            with refused(error, "s3://bucket/x: no answer within 0.5 s"):
                Objects(Url("s3://bucket/x")).ask(write=write)
    kind.clear_instance_cache()


@pytest.mark.parametrize("error", [PermissionError, KeyboardInterrupt])
def test_what_an_answer_raises_comes_out(error: type[BaseException]) -> None:
    def fail(key: str) -> None:
        raise error(key)

    with pytest.raises(error, match="key"):
        _within(5, fail, "key")
