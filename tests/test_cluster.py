"""Work on a Ray cluster of three nodes: what is made, what is survived, what is refused."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asked_tasks import settings_maker, write_tasks
from conftest import ModelMaker, refused
from processes import wait_for
from readied import Readied
from tqdm import tqdm

from benchmarks.ray_nodes import Nodes, three_nodes
from cluster.address import found_address
from cluster.connection import reached
from cluster.nodes import Worker, require_alike, require_store
from cluster.pool import Pool, several_on_nodes
from cluster.watch import Watch
from cluster.worker import Tell, Work
from common.errors import ClusterError, PredictorError
from evaluation.run import evaluate
from gguf_export.bundle import Bundle
from gguf_files.reader import GGUFFile
from powerinfer_bridge.verify.nodes import compare_on_nodes
from powerinfer_bridge.verify.settings import VerifyConfig
from powerinfer_bridge.verify.verification import verify
from predictor.artifact import PredictorArtifact
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig

pytest.importorskip("ray")

SMALL = Worker(cpus=1, gpus=0, memory=1 << 20)
ROOT = Path(__file__).resolve().parents[1]
SECONDS = 240
"""That a test may take before it is ended with the whole process; Ray waits deaf to signals."""


@pytest.fixture(autouse=True)
def _never_hangs() -> Iterator[None]:
    import faulthandler

    faulthandler.dump_traceback_later(SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """The cluster; this process stays connected, so that workers import torch once."""
    import ray

    with three_nodes() as started:
        with reached(started.address):
            yield started
        assert not ray.is_initialized()


@pytest.fixture
def short_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as name:
        yield Path(name)


def settings(store: TraceStore, out: Path, **changes: Any) -> TrainConfig:
    """Scouts, training and thresholds of every layer."""
    values: dict[str, Any] = {"traces": store.path, "out": out, "ffn_bytes": 0.5}
    return TrainConfig(**(values | changes))


@pytest.fixture(scope="module")
def deep_traces(
    make_model: ModelMaker, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> TraceStore:
    """More layers than nodes."""
    place = tmp_path_factory.mktemp("deep")
    model = make_model(place / "model", intermediate_size=96, num_hidden_layers=6)
    sizes: dict[str, Any] = {"tokens": 1000, "context": 64, "importance_bits": 8}
    return collect(
        CollectConfig(model=str(model), data=str(data_file), out=place / "traces", **sizes)
    )


@pytest.fixture(scope="module")
def alone(deep_traces: TraceStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this process makes, with a thread."""
    out = tmp_path_factory.mktemp("alone") / "predictors"
    train_predictors(settings(deep_traces, out))
    return out


def made_of(
    work: Work[int, int],
    items: Iterable[int],
    worker: Worker = SMALL,
    *,
    notes: list[str] | None = None,
    ordered: bool = False,
) -> Iterator[tuple[int, int]]:
    with tqdm(disable=True) as bar:
        told = [] if notes is None else notes
        watch = Watch(bar, told.append, what="numbers", named=str, verbose=True)
        yield from several_on_nodes(lambda: work, items, worker, watch, most=3, ordered=ordered)


def assert_same(found: Path, expected: Path) -> None:
    names = sorted(file.name for file in expected.iterdir())
    assert sorted(file.name for file in found.iterdir()) == names
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    assert [each.name for each in found.parent.iterdir()] == [found.name]


@contextmanager
def killed_node(nodes: Nodes, within: float = 5) -> Iterator[None]:
    """Kill one of two nodes at a random moment of the block, at the latest after it."""
    seed = random.SystemRandom().randrange(1 << 32)
    chosen = random.Random(seed)
    print(f"seed {seed}")  # pytest shows it if this fails
    nodes.fill()
    killer = threading.Timer(chosen.uniform(0, within), nodes.kill, [chosen])
    killer.start()
    try:
        yield
    finally:
        killer.join()


def collection(model: Path, data_file: Path, out: Path, **changes: Any) -> CollectConfig:
    values: dict[str, Any] = {"tokens": 1000, "context": 64, "importance_bits": 8}
    values |= {"model": str(model), "data": str(data_file), "out": out}
    return CollectConfig(**(values | changes))


def assert_same_store(found: Path, expected: Path) -> None:
    names = {file.relative_to(expected) for file in expected.rglob("*") if file.is_file()}
    assert {file.relative_to(found) for file in found.rglob("*") if file.is_file()} == names
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    assert found.name in {each.name for each in found.parent.iterdir()}
    assert not [each for each in found.parent.iterdir() if each.name.startswith(".")]


@pytest.mark.parametrize("weights", ["resident", pytest.param("pipelined", marks=pytest.mark.slow)])
def test_traces_are_the_same_bytes_though_a_node_dies(
    weights: str,
    nodes: Nodes,
    deep_traces: TraceStore,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Path(deep_traces.header.model)
    config = collection(model, data_file, tmp_path / "alone", shard_rows=50)
    collect(config)
    notes: list[str] = []
    monkeypatch.setattr("cluster.pipeline._PATIENCE", 1.0)
    with killed_node(nodes):
        config = replace(config, out=tmp_path / "traces", ray=nodes.address, weights=weights)
        collect(config, notes.append)
    assert_same_store(tmp_path / "traces", tmp_path / "alone")
    assert any(" stages of at most " in line for line in notes) == (weights == "pipelined")


def test_predictors_are_the_same_bytes_though_a_node_dies(
    nodes: Nodes, alone: Path, deep_traces: TraceStore, tmp_path: Path
) -> None:
    out = tmp_path / "predictors"
    with killed_node(nodes):
        train_predictors(settings(deep_traces, out, ray=nodes.address))
    assert_same(out, alone)


@pytest.mark.slow
def test_a_gap_is_measured_though_a_node_dies(
    nodes: Nodes, deep_traces: TraceStore, tmp_path: Path
) -> None:
    config = settings(deep_traces, tmp_path / "alone", ffn_bytes=None, max_ppl_gap=0.5)
    train_predictors(config)
    with killed_node(nodes, within=20):
        train_predictors(replace(config, out=tmp_path / "spread", ray=nodes.address))
    for file in (tmp_path / "alone").iterdir():
        assert (tmp_path / "spread" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
def test_answers_are_the_same(
    nodes: Nodes, model_dir: Path, exact_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.scoring.BOOTSTRAP", 20)
    make = settings_maker(model_dir, write_tasks(tmp_path / "tasks", count=4))
    config = make(predictors=(exact_dir,), output_path=tmp_path / "alone")
    alone = evaluate(config)
    spread = evaluate(replace(config, output_path=tmp_path / "spread", ray=nodes.address))
    assert (spread.scores, spread.differences) == (alone.scores, alone.differences)
    assert [arm.sparsity for arm in spread.arms] == [arm.sparsity for arm in alone.arms]
    assert spread.unfinished == ()


@pytest.mark.slow
def test_a_file_is_compared_with_its_model(
    nodes: Nodes, model_dir: Path, exact_bundle: Bundle, tmp_path: Path
) -> None:
    config = VerifyConfig(file=exact_bundle.model_file, model=str(model_dir), ray=nodes.address)
    compare = compare_on_nodes(config, lambda line: None)
    alone = verify(config.file, config.model, run=False)
    spread = verify(config.file, config.model, run=False, compare=compare)
    assert spread.document() == alone.document()
    assert spread.ok
    tensors = GGUFFile(config.file).tensors
    damaged = tmp_path / "damaged.powerinfer.gguf"
    data = bytearray(config.file.read_bytes())
    data[tensors["blk.1.ffn_gate.weight"].start + 8] ^= 1
    damaged.write_bytes(data)
    found = verify(damaged, config.model, run=False, compare=compare).checks["model tensors"]
    assert not found.ok
    assert "blk.1.ffn_gate.weight differs" in found.line


@pytest.mark.slow
def test_a_killed_driver_is_gone_on_from(
    nodes: Nodes, alone: Path, deep_traces: TraceStore, tmp_path: Path
) -> None:
    nodes.fill()
    out = tmp_path / "predictors"
    config = settings(deep_traces, out, ray=nodes.address)
    code = "from cli import main; main()"
    driver = [sys.executable, "-c", code, "train-predictor", "--ray", nodes.address]
    given = ["--traces", config.traces, "--out", out, "--ffn-bytes", "0.5", "--threads", "1"]
    with subprocess.Popen([*driver, *map(str, given)], cwd=ROOT) as process:

        def committed() -> bool:
            index = out / "predictors.json"
            return index.exists() and bool(PredictorArtifact.open(out).layers)

        wait_for(committed)
        process.kill()
    assert not PredictorArtifact.open(out).complete
    train_predictors(replace(config, resume=True))
    assert_same(out, alone)


def test_a_killed_worker_is_replaced_and_an_error_of_ours_is_not_tried_again(
    nodes: Nodes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def dies_once(number: int, tell: Tell) -> int:
        file = tmp_path / f"begun-{number}"
        if number == 1 and not file.exists():
            file.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number

    def refuses(number: int, tell: Tell) -> int:
        with (tmp_path / "tried").open("a") as file:
            file.write(str(number))
        if number == 0:
            raise PredictorError("layer 0 is damaged", "train again")
        time.sleep(60)
        return 0

    def finds_its_disk_gone(number: int, tell: Tell) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "shared/part")

    assert dict(made_of(dies_once, range(3))) == {0: 0, 1: 1, 2: 4}
    with pytest.raises(OSError, match="'shared/part'") as met:
        list(made_of(finds_its_disk_gone, range(3)))
    assert met.value.errno == errno.ESTALE  # of which the command line makes a line
    begun = time.monotonic()
    with refused(PredictorError, "layer 0 is damaged; train again"):
        list(made_of(refuses, range(9)))
    assert time.monotonic() - begun < 30
    assert (tmp_path / "tried").read_text().count("0") == 1
    assert capfd.readouterr().out == ""


def test_a_straggler_is_made_twice_and_items_come_in_order(nodes: Nodes, tmp_path: Path) -> None:
    def slow_once(number: int, tell: Tell) -> int:
        file = tmp_path / "begun"
        if number == 1 and not file.exists():
            file.touch()
            time.sleep(60)
        time.sleep(0.1)
        return -number

    begun, notes = time.monotonic(), list[str]()
    found = list(made_of(slow_once, range(6), notes=notes, ordered=True))
    assert found == [(number, -number) for number in range(6)]
    assert time.monotonic() - begun < 30
    assert any(line.startswith("1 takes long and is made on ") for line in notes), notes
    assert sum(": " in line and " numbers in " in line for line in notes) >= 1, notes


def test_workers_go_on_after_an_error_and_without_waiting_for_copies(
    nodes: Nodes, tmp_path: Path
) -> None:
    def work(number: int, tell: Tell) -> int:
        if number == 0:
            raise PredictorError("number 0 is refused")
        if number == 1:
            time.sleep(2)
        return number

    pool: Pool[int, int]
    with tqdm(disable=True) as bar, Pool(lambda: work, SMALL, most=3) as pool:
        watch = Watch(bar, lambda line: None, what="numbers", named=str)
        with refused(PredictorError, "number 0 is refused"):
            list(pool.made([1, 0, 2], watch))
        assert sorted(pool.made(range(5, 9), watch)) == [(n, n) for n in range(5, 9)]
        assert list(pool.made((), watch)) == []


def test_nodes_that_cannot_do_the_work_are_refused_before_it(
    nodes: Nodes, deep_traces: TraceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "predictors"
    config = settings(deep_traces, out, ray=nodes.address)
    with refused(ClusterError, "no node", "2 GPUs", "--ray-gpus"):
        train_predictors(replace(config, ray_gpus=2.0))
    with refused(ClusterError, "node ", "object store holds", "--object-store-memory="):
        require_store(1 << 40)
    with refused(ClusterError, "--device meta", "--ray-gpus"):
        train_predictors(replace(config, device="meta"))
    with refused(ClusterError, "node ", "No such file", "every machine"):
        require_alike([], tmp_path / "nowhere")
    seen = deep_traces.path / "manifest.json"
    with monkeypatch.context() as patched:
        patched.setattr("cluster.nodes.sha256", lambda data: "0" * 64)
        with refused(ClusterError, f"{seen} is another file there", "every machine"):
            require_alike([seen], tmp_path)
    monkeypatch.setattr("cluster.nodes.package_version", lambda name: "0.0.7")
    with refused(ClusterError, "node ", "has psp 0.1.0", "this machine 0.0.7"):
        require_alike([], tmp_path)
    assert not out.exists()


def test_a_connection_that_is_there_is_used_and_stays(nodes: Nodes) -> None:
    import ray

    with reached("local"):
        assert ray.get_runtime_context().gcs_address == nodes.address
    assert ray.is_initialized()


def test_work_is_given_up_once_no_node_fits(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.pool._LOOK", 0.1)
    monkeypatch.setattr("cluster.pool._PATIENCE", 0.5)
    with refused(ClusterError, "no node", "64 CPUs"):
        list(made_of(lambda item, tell: item, [1], worker=replace(SMALL, cpus=64)))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1", "is no HOST:PORT"),
        ("127.0.0.1:99999", "is no HOST:PORT"),
        ("ray://127.0.0.1:10001", "--ray auto"),
    ],
)
def test_an_address_without_a_cluster_is_refused(address: str, said: str) -> None:
    with refused(ClusterError, f"--ray {address}: ", said):
        found_address(address)


def test_a_machine_without_a_cluster_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda place: None)
    with refused(ClusterError, "--ray auto: no cluster runs on this machine", "ray start"):
        found_address("auto")


def test_a_port_of_nobody_or_of_another_program_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.address._SECONDS", 0.3)
    begun = time.monotonic()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with refused(ClusterError, f"no cluster at {address}", "ray start"):
            found_address(address)
        server.listen()
        with refused(ClusterError, f"no cluster at {address}", "timed out"):
            found_address(address)
    assert time.monotonic() - begun < 5


@pytest.mark.slow
def test_another_token_is_refused(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, short_path: Path
) -> None:
    monkeypatch.setattr("cluster.address._JOINING", 8.0)
    code = (
        "import sys, time, ray; from cluster.connection import reached\n"
        "with reached('local'):\n"
        "    print(ray.get_runtime_context().gcs_address, flush=True); sys.stdin.read()"
    )
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"TMPDIR": str(short_path)},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        address = process.stdout.readline().strip()
        with refused(ClusterError, f"--ray {address}", "did not let this machine in", "token"):
            found_address(address)
        process.stdin.close()


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.connection.package_version", lambda name: None)
    with refused(ClusterError, "pip install 'psp[ray]'"), reached("local"):
        raise AssertionError


LOCAL = """
import os, sys, tempfile
from cluster.connection import reached
before = dict(os.environ)
with reached("local"):
    import ray
    print(os.listdir(tempfile.gettempdir()), len(ray.nodes()))
    if sys.argv[1:] == ["kill"]:
        os.kill(os.getpid(), 9)
assert {name for name in os.environ if name.startswith("RAY_")} <= before.keys()
"""


def run_local(place: Path, *given: str) -> int:
    """Run `LOCAL` with a directory for temporary files, and a home in it; return its code."""
    environment = os.environ | {"TMPDIR": str(place), "HOME": str(place / "home")}
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_TMPDIR", "RAY_ADDRESS"):
        environment.pop(name, None)
    command = [sys.executable, "-c", LOCAL, *given]
    return subprocess.run(command, env=environment, cwd=ROOT, timeout=SECONDS).returncode


def test_a_cluster_of_ones_own_leaves_nothing(
    short_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_local(short_path) == 0
    assert "psp-scratch" in capfd.readouterr().out
    assert not processes_of(short_path)
    assert list(short_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_process_takes_its_cluster_along(short_path: Path) -> None:
    assert run_local(short_path, "kill") == -signal.SIGKILL
    assert len(list(short_path.iterdir())) == 1
    # Two agents of Ray's, which hold nothing, end by themselves a minute later.
    wait_for(lambda: not processes_of(short_path, named="cmdline"))
    assert run_local(short_path) == 0
    assert list(short_path.iterdir()) == []


def processes_of(place: Path, *, named: str = "environ") -> list[int]:
    """Return processes whose environment, or `cmdline`, names a directory; Ray's agents hide it."""
    found = []
    for file in Path("/proc").glob(f"[0-9]*/{named}"):
        with suppress(OSError):
            if str(place).encode() in file.read_bytes():
                found.append(int(file.parent.name))
    return found


def test_without_the_option_nothing_of_ray_is_imported(new_python: Readied) -> None:
    code = (
        "import sys; from cli import main; main(['train-predictor', '--help'], "
        "standalone_mode=False);"
        "import predictor.training.run;"
        "print(sorted({'ray', 'cluster.connection'} & sys.modules.keys()))"
    )
    done = new_python(code)
    assert done.returncode == 0, done.stderr
    assert "--ray-gpus" in done.stdout
    assert done.stdout.endswith("[]\n")
