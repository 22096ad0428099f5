"""A real process in a memory-limited control group: what goes by memory goes by its limit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker, write_predictors
from processes import ending, forked

from architectures.checkpoint import Checkpoint
from architectures.model import load_model
from common.machine import read_memory, weight_budget
from common.units import MIB
from gguf_export.bundle import export
from gguf_export.settings import ExportConfig
from powerinfer_bridge.doctor.environment import memory_findings
from powerinfer_bridge.engine.engine import Engine

CGROUPS = Path("/sys/fs/cgroup")
LIMIT = 64 * MIB
"""Python and its libraries take more; they are counted where the process was as it read them."""


def decided(model: Path, file: Path) -> dict[str, Any]:
    """Say what goes by the memory of the process that asks."""
    memory = read_memory()
    finding = next(iter(memory_findings(memory, None, ())))
    loaded = load_model(Checkpoint.open(model), dtype=torch.float32, device="cpu")
    return {
        "limit": memory.limit,
        "budget": weight_budget(),
        "doctor": finding.found,
        "streamed": loaded.streamed,
        "resident": Engine(file).weights.resident,
    }


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


@pytest.fixture
def wide_files(make_model: ModelMaker, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint of 52 MB in float32, and its export."""
    model = make_model(tmp_path / "wide", hidden_size=256, intermediate_size=8192)

    def narrow(gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(32, gate.shape[1]), torch.zeros(len(gate), 32)

    write_predictors(model, tmp_path / "predictors", narrow)
    out = tmp_path / "wide.powerinfer.gguf"
    predictors = tmp_path / "predictors"
    config = ExportConfig(model=str(model), predictors=predictors, out=out)
    return model, export(config).model_file


def test_a_limited_process_streams_what_another_keeps_in_memory(
    limited_group: Path, wide_files: tuple[Path, Path], tmp_path: Path
) -> None:
    said = tmp_path / "said.json"

    def work() -> None:
        free = decided(*wide_files)
        (limited_group / "cgroup.procs").write_text(str(os.getpid()))
        said.write_text(json.dumps([free, decided(*wide_files)]))

    assert ending(forked(work)) == 0
    free, limited = json.loads(said.read_text())
    assert (free["streamed"], free["resident"]) == (False, True)
    assert (limited["limit"], limited["budget"]) == (LIMIT, int(0.6 * LIMIT))
    assert "a container's limit of 64.0 MiB" in limited["doctor"]
    assert (limited["streamed"], limited["resident"]) == (True, False)
