"""How much memory there is for weights."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CPU_SHARE = 0.6
_GPU_SHARE = 0.8


def weight_budget(device: str) -> int:
    """Return how many bytes of weights may stay on a device.

    On the CPU 60 % of the machine's memory, or of the container's limit; on a GPU 80 % of what is
    free. The rest is for activations and everything else.
    """
    if torch.device(device).type == "cuda":
        return int(_GPU_SHARE * torch.cuda.mem_get_info(device)[0])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # "max" where the container has no limit of its own.
    with suppress(OSError, ValueError):
        total = min(total, int(_CGROUP_LIMIT.read_text()))
    return int(_CPU_SHARE * total)
