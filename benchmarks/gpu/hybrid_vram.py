"""What PowerInfer shall put into VRAM by psp's plan, and whether that is what it says it did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.units import MIB
from cost_model.model_bytes import ModelBytes, dense_offload
from gguf_export.pwri.hyperparameters import read_hyperparameters
from gguf_export.pwri.memory_plan import MemoryPlan, MemorySettings, plan_memory, vram_option
from gguf_export.pwri.schema import parse_name
from gguf_files.reader import GGUFFile
from powerinfer_bridge.benchmark.placement import PLACED_PARTS, place, read_neuron_facts
from powerinfer_bridge.estimate.file import EstimatedFile

CONTEXT = 256
"""Tokens of every run, which the KV cache has room for."""

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Budgets, as shares of all that PowerInfer can place."""

ALL = 99
"""A number of layers that is all of them, output and KV cache too."""

_PRINTED = MIB // 200 + 1
"""Bytes that a figure in hundredths of a MiB may be beside the truth."""

_APART = ("embedding", "kv_cache", "ffn_neurons")
"""Parts that are not in PowerInfer's `VRAM used`."""

_APPLIED = "GPU index applied"
_OTHERWISE = ("GPU index rebuilt", "GPU index refused")


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What psp expects PowerInfer to do with a budget.

    Attributes:
        index: it comes to read the GPU index, because everything but neurons fits.
        sizes: bytes by what `powerinfer_bridge.programs.output.parse_device` calls them.
    """

    index: bool
    sizes: Mapping[str, int]


def plan_of(path: Path, budget: int) -> MemoryPlan:
    """Return what PowerInfer places of a sparse file under a budget in bytes."""
    file = GGUFFile(path)
    hyper, granted = read_hyperparameters(file), vram_option(budget)[1]
    settings = MemorySettings.of(hyper, budget=granted, n_ctx=CONTEXT)
    return plan_memory(file.tensors.values(), settings)


def expected(path: Path, budget: int) -> Expected:
    """Return what psp's plan says of a file, its index and a budget.

    Args:
        path: sparse file, with `activation/` and the index beside it.
        budget: VRAM as it is asked for, bytes.

    Raises:
        PspError: a damaged file, or statistics of another model.
    """
    file = GGUFFile(path)
    hyper, granted = read_hyperparameters(file), vram_option(budget)[1]
    neurons = read_neuron_facts(file, hyper)
    cpu, gpu = (each.bytes for each in place(file, hyper, neurons, granted, CONTEXT).devices)
    ffn = sum(info.size for name, info in file.tensors.items() if parse_name(name).role == "ffn")
    return Expected(
        index=plan_of(path, budget).complete,
        sizes={
            "vram_budget_bytes": granted,
            "vram_used_bytes": sum(gpu[part] for part in PLACED_PARTS if part not in _APART),
            "kv_vram_bytes": gpu["kv_cache"],
            # Without the numbers of neurons, which PowerInfer does not count.
            "ffn_offloaded_bytes": ffn - cpu["ffn_neurons"],
        },
    )


def elsewhere(said: Mapping[str, object], sizes: Mapping[str, int]) -> int:
    """Return how many bytes lie elsewhere than planned, as far as what is printed tells.

    Args:
        said: what PowerInfer said of its devices. It says nothing of a KV cache that is not in
            VRAM.
        sizes: planned bytes by the same names.

    Returns:
        The largest distance of all sizes, 0 where each is what PowerInfer would print of it.
    """
    distances = []
    for name, planned in sizes.items():
        told = said.get(name, 0)
        assert isinstance(told, int)
        distance = abs(told - planned)
        exact = name == "vram_budget_bytes"
        distances.append(distance if exact or distance > _PRINTED else 0)
    return max(distances)


def as_planned(notes: Iterable[str], *, index: bool) -> bool:
    """Return whether PowerInfer did with the index what psp expects.

    Args:
        notes: of its run.
        index: whether it should read it.
    """
    kept = set(notes)
    return (_APPLIED in kept) == index and not kept & set(_OTHERWISE)


def budgets(path: Path) -> dict[float, int]:
    """Return bytes of VRAM by `SHARES` of all that PowerInfer can place, the KV cache with it."""
    file = EstimatedFile(path)
    everything = file.everything + file.kv_cache(CONTEXT)
    # The option is a float32: it would cut some bytes off the last neurons.
    return {share: int(share * everything) + (MIB if share == 1 else 0) for share in SHARES}


def neuron_budgets(path: Path, shares: Iterable[float]) -> dict[float, int]:
    """Return bytes of VRAM by shares of the neurons, all else being there already."""
    file = EstimatedFile(path)
    fixed = file.but_neurons + file.kv_cache(CONTEXT)
    neurons = file.everything - file.but_neurons
    return {share: fixed + int(share * neurons) + MIB for share in shares}


def dense_layers(model: ModelBytes, budget: int) -> int:
    """Return the `-ngl` with which a dense engine makes the most of a budget."""
    layers = dense_offload(model, budget, CONTEXT)
    return ALL if layers > len(model.layers) else layers


def placed_percent(share: float) -> str:
    """Return a share of what can be placed as figures name it."""
    return {0.0: "no VRAM", 1.0: "all in VRAM"}.get(share, f"{share:.0%} in VRAM")
