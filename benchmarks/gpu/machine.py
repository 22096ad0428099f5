"""Which card it is, and with what it runs."""

from __future__ import annotations

import platform

from common.machine import cpu_name, read_gpus, usable_threads
from common.version import package_version, tool_version


def machine(device: str) -> dict[str, object]:
    """Return what figures depend on, JSON-ready.

    Args:
        device: `cuda`, whose first card is meant, or `cpu`.
    """
    import torch

    found: dict[str, object] = {
        "cpu": cpu_name(),
        "threads": usable_threads(),
        "python": platform.python_version(),
        "psp": tool_version(),
        "torch": str(torch.__version__),
        "triton": package_version("triton"),
        "transformers": package_version("transformers"),
    }
    if device != "cuda":
        return {"card": None, **found}
    facts = torch.cuda.get_device_properties(0)
    driver = next((card.driver for card in read_gpus().cards if card.driver), None)
    return {
        "card": facts.name,
        "memory": facts.total_memory,
        "capability": f"{facts.major}.{facts.minor}",
        "driver": driver,
        "cuda": torch.version.cuda,
        **found,
    }
