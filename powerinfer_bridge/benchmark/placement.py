"""Which device holds what, in bytes, and how much of the work falls on the GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.errors import FormatError
from gguf_export.pwri.gpu_index import file_groups, read_gpu_index
from gguf_export.pwri.gpu_split import captured_share, split_bytes
from gguf_export.pwri.memory_plan import (
    BUCKET_BYTES,
    KEPT_FREE,
    MemoryPlan,
    MemorySettings,
    plan_memory,
    vram_option,
)
from powerinfer_bridge.benchmark.machine import Machine
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.benchmark.subject import Subject

_KINDS = (
    ("embedding", r"(token|position)_embd\..*"),
    ("attention", r"blk\.\d+\.attn_(q|k|v|qkv|output)\..*"),
    ("predictors", r"blk\.\d+\.fc[12]\..*"),
    ("norms", r".*_norm(_2)?\..*"),
    ("output", r"output\..*"),
    ("ffn_neurons", r"blk\.\d+\.ffn_.*"),
)
PLACED_KINDS = (*(kind for kind, _ in _KINDS[:5]), "kv_cache", "ffn_neurons")


@dataclass(frozen=True, kw_only=True)
class HotNeurons:
    """What is known of neurons beside the file.

    Attributes:
        counts: per layer (d_ff,) int64, how often each was active; None without statistics.
        chosen: per layer (d_ff,) bool, those on the GPU; None without an index.
        capacity: bytes of VRAM that the index says they need.
        problem: what is wrong with the index, if it cannot be used.
    """

    counts: Sequence[torch.Tensor] | None = None
    chosen: Sequence[torch.Tensor] | None = None
    capacity: int = 0
    problem: str | None = None


def read_hot_neurons(subject: Subject) -> HotNeurons:
    """Read `activation/` and the GPU index beside a file, each if it is there.

    Raises:
        PredictorError: statistics that are damaged or another model's.
    """
    from gguf_export.pwri.statistics import read_statistics

    hyper, directory = subject.engine.hyper, subject.file.path.parent
    counts = None
    if (directory / "activation").is_dir():
        counts = read_statistics(directory, hyper.n_layers, hyper.d_ff)
    if subject.index is None:
        return HotNeurons(counts=counts)
    groups = file_groups(subject.file)
    try:
        chosen, capacity = read_gpu_index(subject.index, hyper.n_layers, hyper.d_ff, groups)
    except FormatError as error:
        return HotNeurons(counts=counts, problem=str(error))
    return HotNeurons(counts=counts, chosen=chosen, capacity=capacity)


def frequency_curve(hot: HotNeurons) -> dict[str, Any] | None:
    """Return which share of all activations the most active neurons make, all layers together.

    Returns:
        Both shares at every per cent of neurons, and where the GPU's choice lies; None without
        statistics.
    """
    if hot.counts is None:
        return None
    ranked = torch.cat(list(hot.counts)).sort(descending=True).values.double()
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), ranked.cumsum(0)])
    at = torch.tensor([round(len(ranked) * step / 100) for step in range(101)])
    on_gpu = hot.chosen
    return {
        "neuron_share": [step / 100 for step in range(101)],
        "activation_share": (sums[at] / max(1.0, float(sums[-1]))).tolist(),
        "gpu_neuron_share": None
        if on_gpu is None
        else float(torch.cat(list(on_gpu)).double().mean()),
        "gpu_activation_share": None if on_gpu is None else captured_share(hot.counts, on_gpu),
    }


def layer_shares(hot: HotNeurons, layer: int) -> dict[str, float | None]:
    """Return the shares of a layer's neurons and activations on the GPU, None if not known."""
    if hot.chosen is None:
        return {"activation_share_on_gpu": None, "neuron_share_on_gpu": None}
    mask = hot.chosen[layer]
    captured = None if hot.counts is None else captured_share([hot.counts[layer]], [mask])
    return {
        "activation_share_on_gpu": captured,
        "neuron_share_on_gpu": float(mask.double().mean()),
    }


def vram_budget(config: BenchConfig, subject: Subject, machine: Machine) -> int | None:
    """Return the VRAM that PowerInfer takes, None where it uses no GPU."""
    facts = subject.powerinfer_facts
    if facts is None or facts.cuda is False:
        return None
    if config.vram_budget_bytes is not None:
        return vram_option(config.vram_budget_bytes)[1]
    if facts.cuda and machine.gpus:
        return max(0, machine.gpus[0].free_bytes - KEPT_FREE)
    return None


def place(subject: Subject, hot: HotNeurons, budget: int | None, room: int) -> dict[str, Any]:
    """Return the bytes of each kind on each device.

    Neurons on the GPU are those of the index if there is room for it. Else PowerInfer's own solver
    chooses, and is taken to fill what is left; without statistics it puts none there.

    Args:
        subject: files and programs.
        hot: the index.
        budget: VRAM, bytes; None for the CPU alone.
        room: tokens of context of the runs.
    """
    hyper = subject.engine.hyper
    settings = MemorySettings.of(hyper, budget=budget or 0, n_ctx=room)
    plan = plan_memory(subject.file.tensors.values(), settings)
    total, gpu = dict.fromkeys(PLACED_KINDS, 0), dict.fromkeys(PLACED_KINDS, 0)
    for name, info in subject.file.tensors.items():
        kind = next(kind for kind, names in _KINDS if re.fullmatch(names, name))
        total[kind] += info.size
        gpu[kind] += info.size if name in plan.offloaded else 0
    total["kv_cache"] = 2 * settings.kv_half
    gpu["kv_cache"] = plan.kv_halves * settings.kv_half
    gpu["ffn_neurons"], moved = _neurons(plan, hot, hyper.d_ff)
    cpu = {kind: total[kind] - gpu[kind] for kind in PLACED_KINDS}
    cpu["ffn_neurons"] = total["ffn_neurons"] - moved
    devices = [{"name": "CPU", "bytes": cpu}]
    if budget is not None:
        devices.append({"name": "GPU", "bytes": gpu})
    return {"budget_bytes": budget, "devices": devices}


def _neurons(plan: MemoryPlan, hot: HotNeurons, d_ff: int) -> tuple[int, int]:
    """Return the bytes that neurons take on the GPU, and those that the CPU need not read."""
    rows = [each - BUCKET_BYTES for each in plan.bytes_per_neuron]
    if hot.chosen is not None and hot.capacity <= plan.ffn_budget:
        return split_bytes(hot.chosen, plan.bytes_per_neuron), split_bytes(hot.chosen, rows)
    if hot.counts is None:
        return 0, 0
    taken = min(plan.ffn_budget, d_ff * sum(plan.bytes_per_neuron))
    return taken, taken * sum(rows) // sum(plan.bytes_per_neuron)
