"""`psp bench-operators`: what it measures, how it judges and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import cast

import pytest
import torch
from click.testing import Result
from torch import Tensor

from predictor.traces.store import TraceStore
from sparse_operators.benchmark import _tune, judge, operations, operator_table
from sparse_operators.timing import (
    Operation,
    cache_bytes,
    quartiles,
    stream,
    time_calls,
    wall_seconds,
)
from sparse_operators.workload import (
    Inputs,
    Workload,
    draw_rows,
    draw_slots,
    draw_weights,
    intermediate_of,
    random_case,
    scores_of,
    traced_case,
)

Psp = Callable[..., Result]
SMALL = ("--shape", "64,200", "--repeats", 2, "--threads", 1)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def drawn(count: int, d_ff: int, sparsity: float, run: int = 1) -> Tensor:
    return random_case(d_ff, sparsity, run=run).draw(count, generator())


def test_random_masks_meet_the_sparsity_exactly_and_differ() -> None:
    masks = drawn(5, 1000, 0.88)
    assert masks.sum(1).tolist() == [120] * 5
    assert len({tuple(row) for row in masks.tolist()}) == 5
    assert not drawn(2, 10, 1.0).any()
    assert drawn(2, 10, 0.0).all()


def test_clustered_masks_have_long_runs_and_the_same_sparsity() -> None:
    def runs(masks: torch.Tensor) -> int:
        return int(masks.diff(dim=1).sum()) // 2

    clustered = drawn(4, 4096, 0.75, run=64)
    assert clustered.sum(1).tolist() == [1024] * 4
    assert runs(clustered) <= 4 * 1024 // 64
    assert runs(drawn(4, 4096, 0.75)) > 4 * 600


def test_masks_of_tokens_are_drawn_once_each_before_any_is_repeated() -> None:
    masks = torch.eye(6, dtype=torch.bool)
    assert draw_rows(masks, 6, generator()).sum(0).tolist() == [1] * 6
    assert draw_rows(masks, 12, generator()).sum(0).tolist() == [2] * 6
    assert draw_rows(masks, 4, generator()).sum() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_inputs_are_active_exactly_where_the_mask_says(dtype: torch.dtype) -> None:
    masks = drawn(3, 500, 0.9)
    assert torch.equal(scores_of(masks, dtype, generator()) > 0, masks)
    intermediate = intermediate_of(masks, dtype, generator())
    assert torch.equal(intermediate != 0, masks)
    assert (intermediate < 0).any()


def test_operations_take_turns_on_slots_that_follow_each_other() -> None:
    seen: list[tuple[str, int]] = []
    operations = {
        "a": Operation(run=lambda slot: seen.append(("a", slot))),
        "b": Operation(run=lambda slot: seen.append(("b", slot)), slots=2),
    }
    samples = time_calls(operations, slots=4, repeats=2, clock=wall_seconds)
    assert seen == [("a", 0), ("b", 1), ("a", 3), ("b", 0), ("a", 2), ("b", 3)]
    assert {name: len(times) for name, times in samples.items()} == {"a": 2, "b": 2}
    assert all(time >= 0 for times in samples.values() for time in times)


def test_quartiles_are_medians_not_means() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 1000.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


WORK = Workload(
    d_model=1000,
    d_ff=2000,
    dtype=torch.float32,
    device=torch.device("cpu"),
    cases={"50 %": random_case(2000, 0.5), "90 %": random_case(2000, 0.9)},
)
"""A matrix has 8 MB."""


@pytest.mark.parametrize(("cache", "slots"), [(0, 4), (16_000_000, 6), (29_000_000, 12)])
def test_weights_exceed_the_cache(cache: int, slots: int) -> None:
    # Dense products read two thirds of a slot in the mean; 11 slots would always repeat themselves.
    assert WORK.slot_count(cache, turn=11) == slots


@pytest.mark.parametrize(("cache", "slots"), [(0, 5), (16_000_000, 7), (29_000_000, 11)])
def test_a_longer_turn_changes_slots_too(cache: int, slots: int) -> None:
    assert WORK.slot_count(cache, turn=16) == slots


def test_a_graph_of_sparse_calls_needs_weights_by_what_these_read() -> None:
    cases = {"50 %": random_case(2000, 0.5), "75 %": random_case(2000, 0.75)}
    work = replace(WORK, device=torch.device("cuda"), cases=cases)
    assert work.slot_count(20_000_000, turn=11) == 20
    traced = {"layer 0": traced_case(torch.eye(2000, dtype=torch.bool)[:4])}
    assert replace(work, cases=traced).slot_count(20_000_000, turn=11) == 64


def test_cache_sizes_are_read_as_linux_writes_them(tmp_path: Path) -> None:
    cpu, caches = torch.device("cpu"), tmp_path / "sys/devices/system/cpu/cpu0/cache"
    assert cache_bytes(cpu, tmp_path) == 64 << 20
    for number, size in enumerate(["48K\n", "2048K\n", "266240K\n"]):
        (caches / f"index{number}").mkdir(parents=True)
        (caches / f"index{number}" / "size").write_text(size)
    assert cache_bytes(cpu, tmp_path) == 266240 << 10
    (caches / "index2" / "size").write_text("1G\n")
    assert cache_bytes(cpu, tmp_path) == 1 << 30


def test_a_streaming_read_sees_every_element() -> None:
    assert stream(torch.ones(3, 4)).item() == 12
    assert stream(torch.ones(3, 5, dtype=torch.bfloat16)).item() == 15
    halves = torch.tensor([1.0, 2.0]).view(torch.bfloat16).view(1, -1)
    assert stream(halves).item() == 3


def test_the_bound_is_the_active_rows_over_the_fastest_read() -> None:
    samples = {
        "read": [2.0, 2.0, 9.0],
        "s2_dense": [1.0, 1.0, 1.0],
        "s2": [0.2, 0.2, 0.3],
        "s3_dense": [3.0, 3.0, 3.0],
        "s3": [0.5, 0.5, 0.5],
        "ffn_dense": [6.0, 6.0, 6.0],
        "ffn": [2.0, 2.0, 2.0],
    }
    result = judge(samples, WORK, active=200)
    assert result["bandwidth"] == 8e6
    assert result["bandwidth_bound_seconds"] == pytest.approx(0.1)
    assert (result["s2_seconds"], result["s2_speedup"]) == (0.2, pytest.approx(5))
    assert (result["s3_seconds"], result["s3_speedup"]) == (0.5, pytest.approx(6))
    assert result["ffn_speedup"] == pytest.approx(3)
    assert result["s2_bandwidth"] == pytest.approx(4e6)
    assert result["s2_bandwidth_bound_ratio"] == pytest.approx(2)
    assert result["bandwidth_bound_ratio"] == pytest.approx(5)
    assert result["quartiles"]["s2"] == [0.2, 0.25]
    assert judge(samples, WORK, active=0)["bandwidth_bound_ratio"] is None


def test_default_launches_are_timed_beside_the_tuned_ones() -> None:
    case, slots = random_case(24, 0.5), 5
    work = replace(WORK, d_model=16, d_ff=24, dtype=torch.float16, cases={"50 %": case})
    weights = draw_weights(work, slots, generator())
    inputs = Inputs.draw(work, draw_slots(case, slots, 1, generator()), generator())
    timed = operations(inputs, weights, defaults=True)
    assert sum(operation.slots for operation in timed.values()) == 16
    for name in ("s2", "s3", "ffn"):
        tuned, default = timed[name], timed[f"{name}_default"]
        assert torch.equal(cast(Tensor, tuned.run(3)), cast(Tensor, default.run(3)))
    result = judge({name: [float(at)] for at, name in enumerate(timed, 1)}, work, active=12)
    assert result["default_seconds"] == {"s2": 8.0, "s3": 9.0, "ffn": 10.0}
    assert result["s2_seconds"] == 3


def test_what_a_card_cannot_run_is_no_infinity_in_the_document(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inf = float("inf")
    found = Namespace(chosen={}, tried={}, ffn=[1.0, 2.0], fused_ffn=[inf, 3.0])
    monkeypatch.setattr("sparse_operators.triton_tuning.tune", lambda *given: found)
    monkeypatch.setattr("sparse_operators.triton_launch.keep_launches", lambda *given: "file")
    case = random_case(24, 0.5)
    work = replace(WORK, d_model=16, d_ff=24, cases={"50 %": case})
    inputs = Inputs.draw(work, draw_slots(case, 2, 1, generator()), generator())
    document = _tune([inputs], draw_weights(work, 2, generator()))
    assert document["ffn_seconds"] == [1.0, 2.0]
    assert document["fused_ffn_seconds"] == [None, 3.0]
    json.dumps(document, allow_nan=False)


def test_the_table_tells_what_tuning_gained(psp: Psp) -> None:
    printed = psp("bench-operators", *SMALL, "--sparsity", "0.5", "--json").stdout
    document = json.loads(printed) | {"launches": "tuned", "tuning": {"file": "/cache/card.json"}}
    row = document["sparsities"][0] | {"s2_seconds": 2e-6, "s3_seconds": 4e-6, "ffn_seconds": 8e-6}
    row["default_seconds"] = {"s2": 3e-6, "s3": 4e-6, "ffn": 1e-5}
    lines = operator_table(document | {"sparsities": [row]}).splitlines()
    assert any(line.endswith(", tuned launches") for line in lines)
    assert (
        "with default launches, 50 %: S2 3.0 µs (1.50 ×), S3 4.0 µs (1.00 ×), FFN 10.0 µs (1.25 ×)"
    ) in lines
    assert lines[-1] == "tuned launches are kept for later processes in /cache/card.json"


def test_the_document_has_every_sparsity(psp: Psp) -> None:
    result = psp("bench-operators", *SMALL, "--sparsity", "0,0.5,88%,1", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["shape"] == {"d_model": 64, "d_ff": 200}
    assert document["dtype"] == "float32"
    assert document["hardware"]["threads"] == 1
    assert document["versions"]["torch"] == torch.__version__
    assert not document["exceeds_cache"]
    rows = document["sparsities"]
    assert [row["sparsity"] for row in rows] == pytest.approx([0, 0.5, 0.88, 1])
    for row in rows:
        for name in ("s2", "s3"):
            assert row[f"{name}_speedup"] == pytest.approx(
                row[f"{name}_dense_seconds"] / row[f"{name}_seconds"]
            )
            assert len(row["samples"][name]) == 2
            assert row[f"{name}_error"] <= 1e-6
    assert rows[0]["bandwidth_bound_ratio"] > 0
    assert rows[3]["bandwidth_bound_ratio"] is None


def test_rows_that_any_token_activates_are_counted(psp: Psp) -> None:
    command = ("bench-operators", *SMALL, "--sparsity", "0.88", "--tokens", 4)
    document = json.loads(psp(*command, "--json").stdout)
    row = document["sparsities"][0]
    assert document["tokens"] == 4
    assert row["token_sparsity"] == pytest.approx(0.88)
    assert row["sparsity"] == pytest.approx(0.88**4, abs=0.04)
    assert row["s2_error"] <= 1e-6
    assert row["s3_error"] <= 1e-6
    printed = psp(*command).stdout
    assert re.search(r"^88 %: [56]\d\.\d\d %", printed, re.MULTILINE)
    assert "random neurons, 4 tokens at once" in printed


def test_the_table_has_the_cards_columns(psp: Psp) -> None:
    result = psp("bench-operators", *SMALL, "--sparsity", "0.5,1", "--pattern", "clustered")
    assert result.exit_code == 0, result.output
    header, _, first, second, *rest = result.stdout.splitlines()
    for column in ("S2 µs", "S3 µs", "speedup", "× bound"):
        assert column in header
    assert first.startswith("50.00 %")
    assert second.startswith("100.00 %")
    assert second.endswith("–")
    assert "64, d_ff 200, float32, clustered neurons" in "\n".join(rest)
    assert "stays in a cache" in "\n".join(rest)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_are_measured_too(psp: Psp, dtype: str) -> None:
    result = psp("bench-operators", *SMALL, "--sparsity", "0.5", "--dtype", dtype, "--json")
    row = json.loads(result.stdout)["sparsities"][0]
    assert 1e-6 < row["s2_error"] < 1e-2
    assert 1e-6 < row["s3_error"] < 1e-2


def test_patterns_of_real_tokens_bring_shape_and_sparsity(psp: Psp, traces: TraceStore) -> None:
    command = ("bench-operators", "--pattern", traces.path, "--repeats", 1, "--threads", 1)
    result = psp(*command, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    header = traces.header
    assert document["shape"] == {"d_model": header.d_model, "d_ff": header.d_ff}
    rows = document["sparsities"]
    assert [row["label"] for row in rows] == [f"layer {layer}" for layer in header.layers]
    for row, known in zip(rows, traces.activation_sparsity().values(), strict=True):
        assert row["sparsity"] == pytest.approx(known, abs=0.05)
    assert "layer 1: " in psp(*command).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("--shape", "7B"), 2, ["'7B' is no shape", "4096,11008"]),
        (("--shape", "64"), 2, ["is no shape"]),
        (("--shape", "0,64"), 2, ["is no shape"]),
        (("--sparsity", "0.5,1.5"), 2, ["1.5 is not in the range"]),
        (("--sparsity", "nan"), 2, ["not a number"]),
        (("--sparsity", "0.5,x"), 2, ["'x'"]),
        (("--device", "cuda:9"), 1, ["cuda:9", "--device"]),
        (("--device", "nonsense"), 1, ["nonsense", "--device"]),
        (("--device", "meta"), 2, ["run on cpu and cuda"]),
        (("--tune",), 2, ["--tune", "GPU", "--device cuda"]),
        (("--pattern", "no-such-traces"), 1, ["no-such-traces"]),
        (
            ("--pattern", "no-such-traces", "--shape", "7b"),
            2,
            ["bring their --shape", "leave these out"],
        ),
        (("--shape", "9999999,9999999"), 1, ["no memory for", "smaller --shape"]),
        (("--repeats", "0"), 2, ["--repeats"]),
        (("--tokens", "9"), 2, ["--tokens", "1<=x<=8"]),
        (("--tokens", "2", "--tune"), 2, ["--tune is for one token", "--tokens"]),
    ],
)
def test_bad_input_is_one_line(
    psp: Psp, arguments: tuple[str, ...], code: int, parts: list[str]
) -> None:
    result = psp("bench-operators", *arguments)
    assert result.exit_code == code, result.output
    last = result.stderr.strip().splitlines()[-1]
    for part in parts:
        assert part in last
