"""The doctor on machines that are not there: every finding from made-up facts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from powerinfer_bridge.doctor.cgroups import cpu_quota, memory_limit
from powerinfer_bridge.doctor.disk import (
    DiskFacts,
    output_findings,
    read_disk,
    temporary_findings,
)
from powerinfer_bridge.doctor.finding import GIB, Finding, size
from powerinfer_bridge.doctor.gpu import Gpu
from powerinfer_bridge.doctor.memory import MemoryFacts, memory_findings, read_memory
from powerinfer_bridge.doctor.processor import (
    ProcessorFacts,
    processor_findings,
    read_processor,
)
from powerinfer_bridge.doctor.variables import variable_findings

CARD = Gpu(name="NVIDIA X", memory=24 * GIB, free=24 * GIB, driver="550.1", capability="8.9")
PROCESSOR = ProcessorFacts(
    name="A CPU",
    architecture="x86_64",
    flags=frozenset({"avx2", "f16c", "fma"}),
    logical=16,
    usable=16,
    physical=16,
    quota=None,
    load=0.1,
)
MEMORY = MemoryFacts(total=32 * GIB, available=30 * GIB, swap=0, limit=None, open_files=1024)
DISK = DiskFacts(path=Path("/data"), free=100 * GIB, writable=True)


def told(findings: Iterable[Finding], check: str) -> tuple[str, str, str]:
    """Return status, text and remedy of the only finding of a check."""
    (finding,) = [finding for finding in findings if finding.check == check]
    return finding.status.value, finding.found, finding.remedy or ""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_good_processor_is_ok() -> None:
    assert [f.status.value for f in processor_findings(PROCESSOR)] == ["ok"] * 3


@pytest.mark.parametrize(
    ("change", "check", "status", "part", "remedy"),
    [
        ({"flags": frozenset({"f16c", "fma"})}, "CPU", "warning", "no AVX2", "build PowerInfer"),
        ({"flags": frozenset()}, "CPU", "warning", "no AVX2, F16C, FMA", "SIGILL"),
        ({"flags": None}, "CPU", "note", "does not tell", ""),
        ({"architecture": "aarch64"}, "CPU", "note", "not x86-64", ""),
        ({"quota": 2.5}, "cores", "warning", "limit of 2.5 CPUs", "--threads 2;"),
        ({"quota": 0.5}, "cores", "warning", "limit of 0.5 CPUs", "--threads 1;"),
        ({"physical": 8}, "cores", "note", "8 cores, 16 hardware threads", "--threads 8"),
        ({"usable": 4}, "cores", "note", "4 of them open", "--threads 4"),
        ({"physical": None}, "cores", "ok", "16 hardware threads", ""),
        ({"load": 9.0}, "load", "warning", "worthless", "idle"),
        ({"load": 4.0}, "load", "ok", "4.0 processes", ""),
    ],
)
def test_processors_that_are_worth_a_word(
    change: dict[str, object], check: str, status: str, part: str, remedy: str
) -> None:
    facts = replace(PROCESSOR, **change)  # type: ignore[arg-type]
    found = told(processor_findings(facts), check)
    assert found[0] == status
    assert part in found[1]
    assert remedy in found[2]


def test_an_unknown_load_is_not_told() -> None:
    assert "load" not in {f.check for f in processor_findings(replace(PROCESSOR, load=None))}


def test_the_processor_is_read_from_the_systems_files(tmp_path: Path) -> None:
    block = "processor: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2\n\n"
    siblings = {
        f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n // 2}\n"
        for n in range(4)
    }
    root = write(tmp_path, {"proc/cpuinfo": block + block.replace("avx2", "sse"), **siblings})
    facts = read_processor(root)
    assert facts.flags == frozenset({"fpu", "avx2"})
    assert (facts.name, facts.physical) == ("A CPU", 2)


def test_a_system_without_such_files_is_unknown(tmp_path: Path) -> None:
    processor, memory = read_processor(tmp_path), read_memory(tmp_path)
    assert (processor.flags, processor.physical, processor.quota) == (None, None, None)
    assert (memory.total, memory.available, memory.limit, memory.usable) == (None,) * 4
    assert told(memory_findings(memory, None, ()), "memory")[0] == "note"


V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/\n"}


def test_the_smallest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    limits = {
        "a/b/memory.max": "max",
        "a/memory.max": "2000",
        "memory.max": "9000",
        "a/b/cpu.max": "max 100000",
        "a/cpu.max": "150000 100000",
    }
    root = write(tmp_path, V2 | {f"sys/fs/cgroup/{name}": text for name, text in limits.items()})
    assert memory_limit(root) == 2000
    assert cpu_quota(root) == 1.5


def test_in_a_container_the_trees_root_is_its_own_group(tmp_path: Path) -> None:
    root = write(tmp_path, V2 | {"sys/fs/cgroup/memory.max": "4096\n"})
    assert memory_limit(root) == 4096
    assert cpu_quota(root) is None


def test_version_1_limits(tmp_path: Path) -> None:
    limits = {
        "memory/job/memory.limit_in_bytes": "3000",
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "cpu/job/cpu.cfs_quota_us": "50000",
        "cpu/job/cpu.cfs_period_us": "100000",
        "cpu/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_period_us": "100000",
    }
    root = write(tmp_path, V1 | {f"sys/fs/cgroup/{name}": text for name, text in limits.items()})
    assert memory_limit(root) == 3000
    assert cpu_quota(root) == 0.5


def test_no_limit_is_none(tmp_path: Path) -> None:
    huge = {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}
    assert memory_limit(write(tmp_path, V1 | huge)) is None


def test_a_group_cannot_lead_out_of_its_tree(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/../../..\n",
        "memory.max": "1",
        "sys/memory.max": "1",
        "sys/fs/cgroup/memory.max": "7000",
    }
    assert memory_limit(write(tmp_path, files)) == 7000


def test_memory_is_read_in_bytes(tmp_path: Path) -> None:
    text = "MemTotal:  2048 kB\nMemAvailable:  1024 kB\nSwapTotal:  512 kB\nHugePages_Total: 0\n"
    facts = read_memory(write(tmp_path, {"proc/meminfo": text}))
    assert (facts.total, facts.available, facts.swap) == (2 << 20, 1 << 20, 512 << 10)


def test_memory_without_a_file() -> None:
    (finding,) = memory_findings(MEMORY, None, ())
    assert finding.found == "32.0 GiB, 30.0 GiB available, no swap"


@pytest.mark.parametrize(
    ("change", "file_gib", "cards", "status", "part"),
    [
        ({}, 20, (), "ok", "fits"),
        ({}, 20, (CARD,), "ok", "fits"),
        ({"available": 5 * GIB}, 20, (), "warning", "5.0 GiB is free"),
        ({}, 40, (CARD,), "warning", "RAM alone is 32.0 GiB"),
        ({}, 40, (), "problem", "there is 32.0 GiB of RAM"),
        ({}, 60, (CARD,), "problem", "and 24.0 GiB of VRAM"),
        ({"limit": 8 * GIB}, 20, (), "problem", "8.0 GiB of RAM"),
    ],
)
def test_whether_a_file_fits(
    change: dict[str, int], file_gib: int, cards: tuple[Gpu, ...], status: str, part: str
) -> None:
    findings = memory_findings(replace(MEMORY, **change), file_gib * GIB, cards)
    found = told(findings, "memory for the file")
    assert found[0] == status
    assert part in found[1]


def test_a_containers_limit_and_few_open_files() -> None:
    facts = replace(MEMORY, limit=4 * GIB, swap=GIB, open_files=256)
    findings = list(memory_findings(facts, None, ()))
    status, found, _ = told(findings, "memory")
    assert (status, "limit of 4.0 GiB" in found, "swap 1.0 GiB" in found) == ("note", True, True)
    assert told(findings, "open files")[2] == "raise it for this shell: ulimit -n 4096"


@pytest.mark.parametrize(
    ("change", "need", "status", "part"),
    [
        ({}, None, "ok", "100 GiB free"),
        ({}, 4 * GIB, "ok", "needs about 4.0 GiB"),
        ({"free": 3 * GIB}, 4 * GIB, "problem", "needs about 4.0 GiB"),
        ({"free": 3}, None, "warning", "3 bytes free"),
        ({"writable": False}, None, "problem", "may not be written to"),
    ],
)
def test_disks(change: dict[str, object], need: int | None, status: str, part: str) -> None:
    facts = replace(DISK, **change)  # type: ignore[arg-type]
    found = told(output_findings(facts, need), "output disk")
    assert found[0] == status
    assert part in found[1]


@pytest.mark.parametrize(
    ("change", "status"),
    [({}, "ok"), ({"free": 1 << 20}, "warning"), ({"writable": False}, "problem")],
)
def test_temporary_disks(change: dict[str, object], status: str) -> None:
    facts = replace(DISK, **change)  # type: ignore[arg-type]
    assert told(temporary_findings(facts), "temporary disk")[0] == status


def test_a_directory_that_is_not_there_yet_is_looked_at_above(tmp_path: Path) -> None:
    facts = read_disk(tmp_path / "not" / "there")
    assert facts.path == tmp_path
    assert facts.free > 0
    assert facts.writable


@pytest.mark.parametrize(
    ("variables", "has_gpu", "expected"),
    [
        ({}, True, []),
        ({"HF_HUB_OFFLINE": "0"}, True, []),
        ({"HF_HUB_OFFLINE": "1"}, True, ["note"]),
        ({"LLAMA_SPARSE_PRED_THRESHOLD": "-1e30"}, False, ["warning"]),
        ({"OMP_NUM_THREADS": "4"}, False, ["note"]),
        ({"OMP_NUM_THREADS": "4,2"}, False, ["note"]),
        ({"OMP_NUM_THREADS": "9"}, False, ["warning"]),
        ({"OMP_NUM_THREADS": "many"}, False, ["warning"]),
        ({"OMP_NUM_THREADS": "0"}, False, ["warning"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, True, ["warning"]),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, True, ["warning"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, False, ["note"]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, True, ["note"]),
    ],
)
def test_variables(variables: dict[str, str], has_gpu: bool, expected: list[str]) -> None:
    findings = list(variable_findings(variables, usable_threads=8, has_gpu=has_gpu))
    assert [finding.status.value for finding in findings] == expected
    assert all(finding.check in variables for finding in findings)


def test_a_threshold_that_is_no_number_is_shown_as_it_is() -> None:
    variables = {"LLAMA_SPARSE_PRED_THRESHOLD": "high"}
    (finding,) = variable_findings(variables, usable_threads=8, has_gpu=False)
    assert "'high', which is no number" in finding.found


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (1023, "1,023 bytes"),
        (1536, "1.5 KiB"),
        (200 << 20, "200 MiB"),
        (5000 * GIB, "5,000 GiB"),
    ],
)
def test_sizes(number: int, text: str) -> None:
    assert size(number) == text
