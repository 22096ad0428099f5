"""`psp estimate --cluster`: by hand, against the simulated scheduler, and what is no cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import refused

from cli import main
from common.errors import CheckpointError, EngineError, OutputError, PredictorError, PspError
from common.typed_json import parse, plain
from cost_model.cluster import Cluster, load_cluster
from cost_model.cluster_plan import DRIVER, START, STORAGE, Work, scaling, start_up, stops, time_of
from cost_model.hardware import HardwareError
from cost_model.scheduling import Constants, makespan, simulate
from pipeline.cluster_plan import plan_cluster
from pipeline.cluster_rates import DISPATCH
from pipeline.cluster_settings import ClusterConfig
from results.cluster import CLUSTER, ClusterPlan

GB = 1e9
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "relu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
LARGE = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
CPU = """
cpu:
  bandwidth_gb_per_s: 100
  memory_gib: 256
  efficiency: {matrix: 1, rows: 1, columns: 1}
  layer_microseconds: 0
"""
COMPUTE = "  compute_tflop_per_s: 1\n  compute_efficiency: 0.5\n"
HARDWARE = CPU + COMPUTE + "threads: 4\n"


@pytest.fixture
def model(tmp_path: Path) -> str:
    return described(tmp_path, "7b")


def described(place: Path, name: str, **changes: Any) -> str:
    """Write a model's config alone."""
    directory = place / name
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    return str(directory)


def written(place: Path, text: str, name: str = "mine.yaml") -> str:
    file = place / name
    file.write_text(text)
    return str(file)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """Four nodes of two workers, and a file system that takes 1 GB/s and gives 2."""
    written(tmp_path, HARDWARE, "hardware.yaml")
    text = "{hardware: hardware.yaml, nodes: 4, workers_per_node: 2, network_gb_per_s: 10, "
    return load_cluster(written(tmp_path, text + "storage: {write_gb_per_s: 1, read_gb_per_s: 2}}"))


def test_a_cluster_of_ones_own(cluster: Cluster) -> None:
    assert (cluster.workers, cluster.of(3).workers) == (8, 6)
    assert cluster.compute == 0.25e12
    assert cluster.memory == 128 << 30
    assert (cluster.network, cluster.write, cluster.read) == (10 * GB, 1 * GB, 2 * GB)
    assert cluster.assumed == ()


@pytest.mark.parametrize("name", ["8xh100-80g", "8×h100-80g", " 8 x h100-80g"])
def test_a_named_cluster_says_what_it_assumes(name: str) -> None:
    found = load_cluster(name)
    assert (found.nodes, found.workers_per_node) == (8, 1)
    assert found.hardware.gpu is not None
    assert found.compute == pytest.approx(0.41 * 989.4e12)
    assert len(found.assumed) == 3


def test_a_node_without_gpu_has_a_worker_a_thread(tmp_path: Path) -> None:
    found = load_cluster("2x" + written(tmp_path, HARDWARE))
    assert (found.workers, found.compute) == (8, 0.125e12)


def test_work_by_hand(cluster: Cluster) -> None:
    work = Work(name="shards", items=17, parts={"computing": 3.0, "network": 1.0})
    # 17 items on 8 workers are three turns of 4 s.
    assert time_of(work, cluster) == time_of(replace(work, items=24), cluster)
    found = time_of(work, cluster)
    assert found is not None
    assert (found.seconds, found.limit) == (12, "computing")
    beside = time_of(replace(work, overlapped=True), cluster)
    assert beside is not None
    assert beside.seconds == 9
    # Each of four nodes reads 10 GB once, of a file system that gives 2 GB/s.
    assert start_up(replace(work, loaded=10 * GB, start=1.0), cluster) == 21
    # With 16 stages, two to a node, each node reads an eighth; its network would take 0.125 s.
    assert start_up(replace(work, loaded=10 * GB, stages=16), cluster.of(1)) == 0.625
    # A pipeline of two: four items at once, five turns and one more for its second stage.
    piped = time_of(replace(work, stages=2), cluster)
    assert piped is not None
    assert piped.seconds == 24
    assert time_of(replace(work, stages=9), cluster) is None


@pytest.mark.parametrize(
    ("changes", "seconds", "limit"),
    [
        ({"driver": 1.0}, 17, DRIVER),
        ({"written": 2 * GB}, 34, STORAGE),
        ({"read": 2 * GB}, 17, STORAGE),
        ({"start": 13.0}, 25, START),
        ({"items": 8}, 4, "8 shards"),
        ({"rounds": 2.0}, 24, "computing"),
    ],
)
def test_what_limits_work(
    cluster: Cluster, changes: dict[str, Any], seconds: float, limit: str
) -> None:
    work = replace(Work(name="shards", items=17, parts={"computing": 4.0}), **changes)
    found = time_of(work, cluster)
    assert found is not None
    assert (found.seconds, found.limit) == (seconds, limit)


def test_where_more_workers_stop_helping(cluster: Cluster) -> None:
    work = Work(
        name="layers", items=50, parts={"training": 12.0}, driver=0.4, read=4 * GB, start=8.0
    )
    found = [(stop.workers, stop.cause) for stop in stops(work, cluster)]
    assert found == [(6, STORAGE), (30, DRIVER), (50, "50 layers"), (75, START)]
    rows = scaling([work], cluster, (64, 1, 2))
    # One node's two workers take 25 turns, four workers 13, but the files cannot be read sooner.
    assert [row.seconds for row in rows] == [308, 164, 108]
    assert [row.limit for row in rows] == ["training", "training", STORAGE]
    assert rows[1].speedup == pytest.approx(308 / 164)
    assert rows[2].efficiency == pytest.approx(308 / 108 / 64)
    assert scaling([replace(work, stages=3)], cluster, (1, 2))[0].seconds is None


def test_the_simulated_scheduler_agrees(cluster: Cluster) -> None:
    for driver, storage in ((0.0, 0.0), (0.3, 0.0), (1.5, 0.0), (0.1, 1.2)):
        work = Work(
            name="shards",
            items=96,
            parts={"computing": 4.0},
            driver=driver,
            written=storage * GB,
            start=2.0,
        )
        constants = Constants(start_up=2.0, driver=driver, shared=storage, in_order=True)
        simulated = 2.0 + makespan(simulate([4.0] * 96, cluster.workers, constants))
        found = time_of(work, cluster)
        assert found is not None
        # The analysis lets everything go on at once from the first second.
        assert found.seconds == pytest.approx(simulated, rel=0.1)
        assert found.seconds <= simulated


def test_a_7b_model_on_eight_cards(model: str) -> None:
    found = plan_cluster(ClusterConfig(model=model, cluster="8xh100-80g", active=0.12))
    collect, train = found.jobs["collect"], found.jobs["train-predictor"]
    # docs/collect.md: about 9,866 bytes a token and layer; and the gates.
    assert collect.disk_bytes == pytest.approx(400_000 * 32 * 9866 + 32 * 90.2e6, rel=0.01)
    assert collect.items == {"shards": 115}
    assert collect.stages == 1
    assert collect.limit == STORAGE
    # A shard's 3,506 tokens and 32 layers of 1 µs each, recorded.
    recorded = collect.item_seconds["shards"]["computing"] - DISPATCH
    assert recorded == pytest.approx(3506 * 32 * 1.52e-6, rel=0.02)
    assert train.items == {"layers": 32, "windows": 32}
    assert [row.nodes for row in train.scaling] == [1, 2, 4, 8, 16, 32, 64]
    assert train.seconds == train.scaling[3].seconds
    assert ("layers", "32 layers", 32) in {(s.work, s.cause, s.workers) for s in train.stops}
    assert parse(ClusterPlan, json.loads(json.dumps(plain(found)))) == found


def test_a_layer_costs_what_an_h100_measured(model: str) -> None:
    config = ClusterConfig(model=model, cluster="1xh100-80g", tokens=800_000, rank=256)
    layers = plan_cluster(config).jobs["train-predictor"].item_seconds["layers"]
    # docs/gpu.md: 4.5 s for 360,000 rows twice, of which reading took 0.2.
    assert layers["training"] == pytest.approx(4.3, rel=0.05)


def test_what_training_costs_follows_its_settings(model: str) -> None:
    def seconds(**changes: Any) -> float:
        config = ClusterConfig(model=model, cluster="1xh100-80g", **({"rank": 256} | changes))
        return plan_cluster(config).jobs["train-predictor"].item_seconds["layers"]["training"]

    assert seconds(recipe="svd") == pytest.approx(0.5 + DISPATCH)
    # 360,000 rows in 352 steps of 1,024 and 20 epochs; such a step's arithmetic takes 2.08 ms.
    assert seconds(recipe="dejavu") == pytest.approx(0.5 + 20 * 360 / 1.024 * 2.08e-3, rel=0.01)
    assert seconds() < seconds(rank=1024) < seconds(rank="auto", max_ppl_gap=0.01)


def test_a_model_that_no_card_holds_is_a_pipeline(tmp_path: Path) -> None:
    model = described(tmp_path, "70b", **LARGE)
    found = plan_cluster(ClusterConfig(model=model, cluster="8xh100-80g"))
    collect = found.jobs["collect"]
    # 138 GB of weights, 68 for each card.
    assert collect.stages == 3
    assert [row.seconds is None for row in collect.scaling] == [True, True, *[False] * 5]
    assert "passing residuals on" in collect.item_seconds["shards"]
    alone = plan_cluster(ClusterConfig(model=model, cluster="2xh100-80g")).jobs["collect"]
    assert alone.seconds is None
    assert alone.limit == "memory"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["estimate", *arguments])


def test_the_command(model: str, tmp_path: Path) -> None:
    out = tmp_path / "plan"
    result = run(model, "--cluster=8xh100-80g", "--out", str(out))
    assert result.exit_code == 0, result.output
    for told in ("ESTIMATE", "measured elsewhere", "assumed", "64", "stop helping"):
        assert told in result.stdout
    document = json.loads(run("--cluster", "8×h100-80g", model, "--json").stdout)
    assert document["kind"] == "psp.cluster"
    assert document["label"] == "estimate"
    assert CLUSTER.read(out).jobs["collect"].seconds == document["jobs"]["collect"]["seconds"]
    shown = CliRunner().invoke(main, ["inspect", str(out)])
    assert shown.exit_code == 0, shown.output
    assert "8×h100-80g" in shown.stdout or "8xh100-80g" in shown.stdout
    with refused(OutputError, "cluster.json"):
        plan_cluster(ClusterConfig(model=model, cluster="8xh100-80g", out=out))


@pytest.mark.parametrize(
    ("kind", "cluster", "changes", "told"),
    [
        (HardwareError, "h100-80g", {}, "N×HARDWARE"),
        (HardwareError, "0xh100-80g", {}, "nodes"),
        (HardwareError, "4xabacus", {}, "'abacus'"),
        (HardwareError, "none.yaml", {}, "check --cluster"),
        (HardwareError, "4xnone.yaml", {}, "check --cluster"),
        (HardwareError, "4xrtx4060ti-16g+ddr4", {}, "compute_tflop_per_s"),
        (PredictorError, "4xh100", {"rank": (32, 64)}, "32 layers"),
        (PredictorError, "4xh100", {"tokens": 100}, "--tokens"),
        (CheckpointError, "4xh100", {"model": "owner/name"}, "config.json"),
        (EngineError, "4xh100", {"tokens": 0}, "--tokens"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    kind: type[PspError], cluster: str, changes: dict[str, Any], told: str, model: str
) -> None:
    with refused(kind, told):
        plan_cluster(ClusterConfig(**({"model": model, "cluster": cluster} | changes)))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{hardware: h100}", "nodes"),
        ("{hardware: h100, nodes: 0}", "nodes"),
        ("{hardware: h100, nodes: 2, network_gb_per_s: .nan}", "network_gb_per_s"),
        ("{hardware: h100, nodes: 2, colour: red}", "colour"),
        ("{hardware: h100, nodes: 2", "not valid YAML"),
        ("{hardware: silent.yaml, nodes: 2}", "workers_per_node"),
        ("{hardware: h100, nodes: 2, storage: {write_gb_per_s: 0}}", "write_gb_per_s"),
    ],
)
def test_a_damaged_description_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    written(tmp_path, CPU, "silent.yaml")
    with refused(HardwareError, told):
        load_cluster(written(tmp_path, text))


def test_a_block_that_no_worker_holds(model: str, tmp_path: Path) -> None:
    small = written(tmp_path, HARDWARE.replace("memory_gib: 256", "memory_gib: 4"))
    with refused(HardwareError, "holds", "block"):
        plan_cluster(ClusterConfig(model=model, cluster=f"2x{small}"))
