"""The doctor on machines that are not there: every finding from made-up facts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from common.finding import Finding
from common.machine import Gpu, Gpus, Memory, Processor
from common.units import GIB
from powerinfer_bridge.doctor.environment import (
    DiskFacts,
    gpu_findings,
    memory_findings,
    open_file_findings,
    output_findings,
    processor_findings,
    read_disk,
    temporary_findings,
    variable_findings,
)
from powerinfer_bridge.programs.build import threshold_read

CARD = Gpu(name="NVIDIA X", memory=24 * GIB, free=24 * GIB, driver="550.1", capability="8.9")
PROCESSOR = Processor(
    name="A CPU",
    architecture="x86_64",
    flags=frozenset({"avx2", "f16c", "fma"}),
    logical=16,
    usable=16,
    physical=16,
    quota=None,
    load=0.1,
)
MEMORY = Memory(total=32 * GIB, available=30 * GIB, swap=0, limit=None)
DISK = DiskFacts(path=Path("/data"), free=100 * GIB, writable=True)


def told(findings: Iterable[Finding], check: str) -> tuple[str, str, str]:
    """Return status, text and remedy of the only finding of a check."""
    (finding,) = [finding for finding in findings if finding.check == check]
    return finding.status.value, finding.found, finding.remedy or ""


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


def test_cards_and_their_memory() -> None:
    assert told(gpu_findings(Gpus(cards=())), "GPU")[0] == "ok"
    assert told(gpu_findings(Gpus(cards=(CARD,))), "GPU")[0] == "ok"
    busy = replace(CARD, free=2 * GIB)
    status, found, remedy = told(gpu_findings(Gpus(cards=(busy,))), "GPU")
    assert (status, "2.0 GiB of 24.0 GiB free" in found) == ("warning", True)
    assert "nvidia-smi" in remedy


def test_a_sick_driver_is_a_problem_and_its_cards_are_told() -> None:
    card = Gpu(name="NVIDIA X", memory=0, free=0)
    first, second = gpu_findings(Gpus(cards=(card,), failure="nvidia-smi: no end after 20 s"))
    assert (first.status.value, first.found) == ("problem", "nvidia-smi: no end after 20 s")
    assert "driver" in (first.remedy or "")
    assert (second.status.value, second.found) == ("ok", "NVIDIA X")


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


def test_a_containers_limit() -> None:
    findings = memory_findings(replace(MEMORY, limit=4 * GIB, swap=GIB), None, ())
    status, found, _ = told(findings, "memory")
    assert (status, "limit of 4.0 GiB" in found, "swap 1.0 GiB" in found) == ("note", True, True)


def test_few_open_files() -> None:
    assert told(open_file_findings(256), "open files") == (
        "warning",
        "a process may open 256",
        "raise it for this shell: ulimit -n 4096",
    )
    assert list(open_file_findings(1024)) == list(open_file_findings(None)) == []


@pytest.mark.parametrize(
    ("change", "need", "status", "part"),
    [
        ({}, None, "ok", "100 GiB free"),
        ({}, 4 * GIB, "ok", "needs about 4.0 GiB"),
        ({"free": 3 * GIB}, 4 * GIB, "problem", "needs about 4.0 GiB"),
        ({"free": 3}, None, "warning", "3 B free"),
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


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("-1e30", -1e30),
        (" 2", 2),
        ("", 0),
        ("0,5", 0),
        ("1,5", 1),
        ("1e", 1),
        ("1_0", 1),
        ("high", 0),
        ("\u0663", 0),
        (".5.", 0.5),
        ("0x1p3", 8),
        ("inf", math.inf),
    ],
)
def test_a_threshold_is_told_as_powerinfer_reads_it(text: str, read: float) -> None:
    """The expected ones are what its log said of each."""
    variables = {"LLAMA_SPARSE_PRED_THRESHOLD": text}
    (finding,) = variable_findings(variables, usable_threads=8, has_gpu=False)
    assert threshold_read(text) == read
    odd = text not in ("-1e30", " 2", "0x1p3")
    assert finding.found.startswith(f"{text!r}, which is no number" if odd else f"{read:g}: ")
    assert f"{read:g}: a PowerInfer run by hand takes it instead of the file's" in finding.found
