"""A real process in a memory-limited control group: what goes by memory goes by its limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from common.units import MIB

CGROUPS = Path("/sys/fs/cgroup")
LIMIT = 64 * MIB
"""Python and its libraries take more; they are counted where the process was as it read them."""

PROCESS = """
import json, os, pathlib, sys
import torch
from common.machine import read_memory, weight_budget
from powerinfer_bridge.doctor.environment import memory_findings

pathlib.Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
memory = read_memory()
finding = list(memory_findings(memory, None, ()))[0]
print(json.dumps({"limit": memory.limit, "budget": weight_budget(), "doctor": finding.found}))
"""


def own_groups() -> Iterator[tuple[Path, str]]:
    """Yield this process's control groups that may limit memory, and the file that limits it."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                yield CGROUPS / controllers / path.lstrip("/"), "memory.limit_in_bytes"
            elif number == "0" and not controllers:
                yield CGROUPS / path.lstrip("/"), "memory.max"


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A control group below this process's own that leaves its processes little memory."""
    why = "this process is in no control group that counts memory"
    for parent, name in own_groups():
        group = parent / f"psp-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            why = f"{group} cannot be made: {error.strerror}"
            continue
        try:
            (group / name).write_text(str(LIMIT))
        except OSError as error:
            why = f"{group / name} cannot be written: {error.strerror}"
        else:
            yield group
            return
        finally:
            group.rmdir()
    pytest.skip(f"no memory-limited process can be made here: {why}")


def test_a_limited_process_goes_by_its_limit(limited_group: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(limited_group)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    limited = json.loads(run.stdout)
    assert (limited["limit"], limited["budget"]) == (LIMIT, int(0.6 * LIMIT))
    assert "a container's limit of 64.0 MiB" in limited["doctor"]
