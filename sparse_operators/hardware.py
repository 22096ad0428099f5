"""What measured figures depend on besides the code: machine and versions."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_CPU_FACTS = Path("/proc/cpuinfo")


def hardware(device: torch.device) -> dict[str, Any]:
    """Return the name of what computes and, of a CPU, its threads, of a GPU, its driver."""
    if device.type != "cuda":
        return {"name": _cpu_name(), "threads": torch.get_num_threads()}
    name = torch.cuda.get_device_name(device)
    return {"name": name, "cuda": torch.version.cuda, "driver": _driver()}


def versions() -> dict[str, str | None]:
    """Return the versions of Python, torch and Triton; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _cpu_name() -> str:
    if _CPU_FACTS.is_file():
        for line in _CPU_FACTS.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0]
