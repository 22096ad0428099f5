"""The machine as psp may use it: made-up containers' limits, processors, cards."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stand_ins import write_program

from common.machine import (
    bfloat16_note,
    cpu_name,
    cpu_quota,
    device_named,
    memory_limit,
    parse_query,
    read_gpus,
    read_memory,
    read_processor,
    usable_threads,
    weight_budget,
)
from common.units import GIB

BFLOAT16 = "_is_mkldnn_bf16_supported"
V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/\n"}
NO_LIMIT_V1 = "9223372036854771712"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def grouped(root: Path, own: dict[str, str], limits: dict[str, str]) -> Path:
    """Make up a system: the process's own groups, and files below /sys/fs/cgroup."""
    return write(root, own | {f"sys/fs/cgroup/{name}": text for name, text in limits.items()})


def test_the_smallest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    limits = {
        "a/b/memory.max": "max",
        "a/memory.max": "2000",
        "memory.max": "9000",
        "a/b/cpu.max": "max 100000",
        "a/cpu.max": "150000 100000",
    }
    root = grouped(tmp_path, V2, limits)
    assert memory_limit(root) == 2000
    assert cpu_quota(root) == 1.5


def test_in_a_container_the_trees_root_is_its_own_group(tmp_path: Path) -> None:
    root = grouped(tmp_path, V2, {"memory.max": "4096\n"})
    assert memory_limit(root) == 4096
    assert cpu_quota(root) is None


def test_version_1_limits(tmp_path: Path) -> None:
    limits = {
        "memory/job/memory.limit_in_bytes": "3000",
        "memory/memory.limit_in_bytes": NO_LIMIT_V1,
        "cpu/job/cpu.cfs_quota_us": "50000",
        "cpu/job/cpu.cfs_period_us": "100000",
        "cpu/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_period_us": "100000",
    }
    root = grouped(tmp_path, V1, limits)
    assert memory_limit(root) == 3000
    assert cpu_quota(root) == 0.5


def test_no_limit_is_none(tmp_path: Path) -> None:
    assert (
        memory_limit(grouped(tmp_path, V1, {"memory/memory.limit_in_bytes": NO_LIMIT_V1})) is None
    )


def test_a_group_cannot_lead_out_of_its_tree(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/../../..\n",
        "memory.max": "1",
        "sys/memory.max": "1",
        "sys/fs/cgroup/memory.max": "7000",
    }
    assert memory_limit(write(tmp_path, files)) == 7000


BOTH = {"proc/self/cgroup": "4:memory:/box/job\n0::/box\n"}
"""A system with both versions mounted, as systemd's hybrid hierarchy has them."""


@pytest.mark.parametrize(
    ("own", "limits", "least"),
    [
        (V2, {"a/b/memory.max": "1000", "a/memory.max": "max"}, 1000),
        (V2, {"a/b/memory.max": "5000", "a/memory.max": "3000"}, 3000),
        (V2, {"a/c/memory.max": "10", "a/b/memory.max": "max"}, None),
        (V2, {"memory.max": "2000"}, 2000),
        (V1, {"memory/job/memory.limit_in_bytes": "1000"}, 1000),
        (
            {"proc/self/cgroup": "4:memory:/box/job\n"},
            {
                "memory/box/job/memory.limit_in_bytes": NO_LIMIT_V1,
                "memory/box/memory.limit_in_bytes": "3000",
                "memory/memory.limit_in_bytes": "5000",
            },
            3000,
        ),
        ({"proc/self/cgroup": "4:memory:/docker/0a1b\n"}, {"memory/memory.limit_in_bytes": "7"}, 7),
        (
            BOTH,
            {"memory/box/memory.limit_in_bytes": "4000", "unified/box/memory.max": "6000"},
            4000,
        ),
        (V1, {}, None),
        ({}, {}, None),
    ],
)
def test_weights_may_fill_a_share_of_what_a_container_leaves(
    tmp_path: Path, own: dict[str, str], limits: dict[str, str], least: int | None
) -> None:
    root = grouped(tmp_path, own, limits)
    memory = read_memory(root)
    assert memory.limit == least
    assert memory.usable == (memory.total if least is None else least)
    assert weight_budget(root=root) == int(0.6 * memory.usable)


def test_a_limit_above_the_machines_memory_is_none(tmp_path: Path) -> None:
    root = grouped(tmp_path, V2, {"memory.max": str(1 << 55)})
    assert weight_budget(root=root) == int(0.6 * read_memory().total)
    assert replace(read_memory(), total=5 * GIB, limit=7 * GIB).usable == 5 * GIB


def test_this_machines_memory_is_read_in_bytes() -> None:
    memory = read_memory()
    assert memory.total == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.available <= memory.total
    assert memory.swap >= 0


def test_the_processor_is_read_from_the_systems_files(tmp_path: Path) -> None:
    block = "processor: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2\n\n"
    root = write(tmp_path, {"proc/cpuinfo": block + block.replace("avx2", "sse")})
    facts = read_processor(root)
    assert (facts.name, facts.flags) == ("A CPU", frozenset({"fpu", "avx2"}))


def test_a_system_without_such_files_is_unknown(tmp_path: Path) -> None:
    facts = read_processor(tmp_path)
    assert (facts.name, facts.flags, facts.quota) == ("", None, None)


def test_this_machines_processor_is_read() -> None:
    facts = read_processor()
    assert facts.physical is None or 1 <= facts.physical <= facts.logical
    assert 1 <= facts.threads <= facts.usable == usable_threads() <= facts.logical
    assert cpu_name()


def test_cards_are_read_from_the_drivers_tool(tmp_path: Path) -> None:
    line = "NVIDIA H100, 80GB, 81559, 80000, 550.54, 9.0"
    tool = write_program(tmp_path / "nvidia-smi", f"print({line!r})")
    found = read_gpus(tmp_path, str(tool))
    (gpu,) = found.cards
    assert (gpu.name, gpu.memory, gpu.driver) == ("NVIDIA H100, 80GB", 81559 << 20, "550.54")
    assert (gpu.free, gpu.capability, found.failure) == (80000 << 20, "9.0", None)


def test_what_an_old_driver_does_not_tell() -> None:
    (gpu,) = parse_query("Tesla, [N/A], [N/A], 418.1, [N/A]\n")
    assert (gpu.memory, gpu.free, gpu.capability) == (0, 0, "")
    assert parse_query("No devices were found\n") == ()


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("print('Failed to initialize NVML'); raise SystemExit(9)", "Failed to initialize NVML"),
        ("raise SystemExit(4)", "ended with code 4"),
        ("import time; time.sleep(60)", "no end after 0.5 s"),
        (None, "cannot be started (Exec format error)"),
    ],
)
def test_a_sick_driver_is_told_and_its_card_still_counts(
    tmp_path: Path, body: str | None, part: str
) -> None:
    card = {"proc/driver/nvidia/gpus/0000:01/information": "Model: \t NVIDIA X\nIRQ: 1\n"}
    tool = write_program(tmp_path / "nvidia-smi", body or "")
    if body is None:
        tool.write_bytes(b"\x7fELF nonsense")
    timeout = 0.5 if "sleep" in (body or "") else 30
    found = read_gpus(write(tmp_path, card), str(tool), timeout=timeout)
    assert [gpu.name for gpu in found.cards] == ["NVIDIA X"]
    assert found.failure is not None
    assert found.failure.startswith(f"{tool}: ")
    assert part in found.failure


@pytest.mark.parametrize("there", [True, False])
def test_auto_is_a_card_if_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    assert device_named("auto") == ("cuda" if there else "cpu")
    assert device_named("cpu") == "cpu"
    assert device_named("cuda:1") == "cuda:1"


def test_a_processor_without_bfloat16_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, BFLOAT16, lambda: False)
    line = bfloat16_note("cpu")
    assert line is not None
    assert "--precision float32" in line
    assert bfloat16_note("cuda") is None
    monkeypatch.setattr(torch.ops.mkldnn, BFLOAT16, lambda: True)
    assert bfloat16_note("cpu") is None
