"""The doctor on installations that are not there: Python, packages, torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from test_doctor_environment import CARD, told

from common.errors import FormatError
from common.finding import Finding, guarded, ok
from common.units import GIB
from powerinfer_bridge.doctor.installation import (
    PackageFacts,
    TorchDevice,
    TorchFacts,
    package_findings,
    parse_requirements,
    read_packages,
    read_torch,
    torch_findings,
)

PACKAGES = PackageFacts(
    python="3.11.4",
    least_python="3.10",
    required={"torch": "2.6", "click": ""},
    installed={"torch": "2.6.0+cpu", "click": "1", "triton": "3", "llama-cpp-python": "0.3"},
)
DEVICE = TorchDevice(name="NVIDIA X", capability=(8, 9), memory=24 * GIB)
CUDA = TorchFacts(
    version="2.13.0",
    cuda="12.8",
    available=True,
    said="",
    built_for=("sm_80", "sm_90"),
    devices=(DEVICE,),
)


def test_requirements_of_extras_are_left_out() -> None:
    lines = ["torch>=2.6", "click", "tqdm >= 4.66 ; python_version > '3'", "x>=1; extra == 'dev'"]
    assert parse_requirements(lines) == {"torch": "2.6", "click": "", "tqdm": "4.66"}


def test_our_own_packages_are_found() -> None:
    facts = read_packages()
    assert {"torch", "click", "gguf"} <= facts.required.keys() <= facts.installed.keys()
    assert facts.least_python == "3.10"


def test_a_sound_installation_is_ok() -> None:
    findings = list(package_findings(PACKAGES))
    assert {finding.status.value for finding in findings} == {"ok"}
    assert told(findings, "packages")[1].startswith("all 2 ")


@pytest.mark.parametrize(
    ("version", "older"),
    [("2.5.9", True), ("2.6", False), ("2.6.0rc1", False), ("2.10.0", False), ("junk", True)],
)
def test_versions_are_compared_as_numbers(version: str, older: bool) -> None:
    facts = replace(PACKAGES, installed={**PACKAGES.installed, "torch": version})
    findings = list(package_findings(facts))
    assert ("torch" in {finding.check for finding in findings}) == older
    if older:
        status, found, remedy = told(findings, "torch")
        assert status == "problem"
        assert found == f"{version} is older than 2.6"
        assert "'torch>=2.6'" in remedy


def test_what_is_missing() -> None:
    findings = list(package_findings(replace(PACKAGES, installed={}, python="3.9.18")))
    assert told(findings, "Python")[:2] == ("problem", "3.9.18 is too old")
    assert told(findings, "torch")[:2] == ("problem", "not installed")
    assert told(findings, "click")[2].endswith("--upgrade click")
    assert told(findings, "triton")[0] == "note"
    assert told(findings, "llama-cpp-python")[0] == "note"


CPU = replace(CUDA, cuda=None, available=False, built_for=(), devices=())
UNUSABLE = replace(CUDA, available=False, said="The NVIDIA driver is too old", devices=())


@pytest.mark.parametrize(
    ("facts", "has_card", "status", "part", "remedy"),
    [
        (CUDA, True, "ok", "CUDA 12.8", ""),
        (CPU, False, "ok", "without CUDA", ""),
        (CPU, True, "warning", "without CUDA", "CUDA build of torch"),
        (UNUSABLE, False, "note", "no NVIDIA GPU is visible", ""),
        (UNUSABLE, True, "problem", "driver is too old", "update the driver (now 550.1)"),
    ],
)
def test_builds_of_torch(
    facts: TorchFacts, has_card: bool, status: str, part: str, remedy: str
) -> None:
    found = told(torch_findings(facts, (CARD,) if has_card else ()), "torch")
    assert found[0] == status
    assert part in found[1]
    assert remedy in found[2]


@pytest.mark.parametrize(
    ("capability", "built_for", "status"),
    [
        ((8, 9), ("sm_80", "sm_90"), "ok"),
        ((9, 0), ("sm_80", "sm_90a"), "ok"),
        ((12, 0), ("sm_80", "sm_90"), "problem"),
        ((12, 0), ("sm_90", "compute_90"), "ok"),
        ((8, 0), ("sm_86",), "problem"),
        ((7, 5), ("sm_75",), "note"),
        ((10, 3), ("sm_100",), "ok"),
        ((8, 9), (), "ok"),
    ],
)
def test_cards_that_torch_has_code_for(
    capability: tuple[int, int], built_for: tuple[str, ...], status: str
) -> None:
    device = replace(DEVICE, capability=capability)
    facts = replace(CUDA, built_for=built_for, devices=(device,))
    assert told(torch_findings(facts, (CARD,)), "GPU for torch")[0] == status


def test_this_torch_is_read() -> None:
    facts = read_torch()
    assert facts.version[0].isdigit()
    assert len(facts.devices) == 0 or facts.available


@pytest.mark.parametrize(
    ("error", "found", "remedy"),
    [
        (FormatError("f: is bad", "mend it"), "f: is bad", "mend it"),
        (PermissionError(13, "Permission denied"), "the system refused", "permissions"),
        (ImportError("libcudart.so.12:\ncannot open"), "failed: libcudart.so.12: cannot", "mend"),
    ],
)
def test_a_check_that_fails_is_a_finding_after_those_it_made(
    error: Exception, found: str, remedy: str
) -> None:
    def check() -> Iterator[Finding]:
        yield ok("first", "fine")
        raise error

    first, last = guarded("check", check)
    assert first.found == "fine"
    assert (last.check, last.status.value) == ("check", "problem")
    assert found in last.found
    assert remedy in (last.remedy or "")


def test_a_bug_stays_a_bug() -> None:
    def check() -> Iterator[Finding]:
        raise KeyError("bug")
        yield ok("never", "")

    with pytest.raises(KeyError):
        list(guarded("check", check))
