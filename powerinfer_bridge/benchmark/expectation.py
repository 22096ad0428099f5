"""What the cost model expects of the file that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.errors import PspError
from cost_model.hardware import THIS, load_hardware
from powerinfer_bridge.benchmark.machine import Machine
from powerinfer_bridge.benchmark.settings import BenchConfig


def has_gpu(config: BenchConfig, machine: Machine) -> bool:
    """Tell whether `--hardware` has a GPU.

    Raises:
        PspError: there is no such hardware; better said before than after a long benchmark.
    """
    if config.hardware is None or config.hardware == THIS:  # is measured at the end
        return bool(machine.gpus)
    return load_hardware(config.hardware).gpu is not None


def expect(
    config: BenchConfig, document: Mapping[str, Any], *, context: int, gpu: bool
) -> tuple[dict[str, Any] | None, str | None]:
    """Return the estimate for `--hardware`, if one is named, or why there can be none.

    Args:
        config: settings.
        document: the benchmark's, which says how many neurons are computed.
        context: tokens that the KV cache had room for.
        gpu: whether the hardware has one, so that a VRAM budget means something.
    """
    if config.hardware is None:
        return None, None
    from powerinfer_bridge.estimate.run import estimate
    from powerinfer_bridge.estimate.settings import EstimateConfig

    settings = EstimateConfig(
        file=config.file,
        hardware=config.hardware,
        bench=document,
        context=context,
        vram_budget=config.vram_budget if gpu else None,
        threads=config.threads,
    )
    try:
        found = estimate(settings)
    except PspError as error:  # what was measured is worth more
        return None, str(error)
    return {key: found[key] for key in ("hardware", "tokens_per_second")}, None
