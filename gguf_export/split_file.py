"""The GPU split of an exported file: which neurons PowerInfer keeps in VRAM under a budget."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import ExportError, FormatError
from common.table import fact_table
from common.units import parse_size
from gguf_export.pwri.gpu_index import file_groups, index_path, read_gpu_index, write_gpu_index
from gguf_export.pwri.gpu_split import captured_share, choose_neurons, split_bytes
from gguf_export.pwri.hyperparameters import read_hyperparameters
from gguf_export.pwri.memory_plan import MemorySettings, plan_memory, vram_option
from gguf_export.pwri.reader import GGUFFile
from gguf_export.pwri.statistics import read_statistics
from gguf_export.settings import SplitConfig


@dataclass(frozen=True, kw_only=True)
class SplitResult:
    """What was chosen, as JSON has it.

    Attributes:
        gpu_index: the written file.
        powerinfer_option: to run PowerInfer with.
        vram_budget_bytes: what PowerInfer makes of it.
        everything_but_ffn_fits: whether neurons may follow at all.
        kv_cache_in_vram: whether both of its halves are there.
        ffn_bytes_in_vram: bytes that the neurons take.
        activation_share_on_gpu: share of all activations that they account for.
        neuron_share_on_gpu: share of all neurons.
        layers: the same of each layer.
    """

    gpu_index: Path
    powerinfer_option: str
    vram_budget_bytes: int
    everything_but_ffn_fits: bool
    kv_cache_in_vram: bool
    ffn_bytes_in_vram: int
    activation_share_on_gpu: float
    neuron_share_on_gpu: float
    layers: tuple[float, ...]


def split(config: SplitConfig) -> SplitResult:
    """Write `FILE.generated.gpuidx`, which PowerInfer loads instead of running its own solver.

    Raises:
        PspError: a damaged file, no statistics, an existing index, or a refused write.
    """
    file = GGUFFile(config.file)
    if not file.sparse:
        raise FormatError(
            f"{config.file}: a dense file has no GPU split", "pass a *.powerinfer.gguf"
        )
    hyper = read_hyperparameters(file)
    option, granted = vram_option(parse_size(config.vram_budget))
    settings = MemorySettings.of(
        hyper, budget=granted, n_ctx=config.context, kv_type=config.kv_type
    )
    plan = plan_memory(file.tensors.values(), settings)
    counts = read_statistics(config.file.parent, hyper.n_layers, hyper.d_ff)
    groups = file_groups(file)
    chosen = choose_neurons(counts, plan.bytes_per_neuron, plan.ffn_budget, groups=groups)
    used = split_bytes(chosen, plan.bytes_per_neuron)
    target = index_path(config.file)
    if not config.force and os.path.lexists(target):
        raise ExportError(f"{target} exists", "pass --force to replace it")
    write_gpu_index(target, chosen, used, groups)
    read_gpu_index(target, hyper.n_layers, hyper.d_ff, groups)  # verifies it
    shares = tuple(float(mask.double().mean()) for mask in chosen)
    return SplitResult(
        gpu_index=target,
        powerinfer_option=f"--vram-budget {option}",
        vram_budget_bytes=granted,
        everything_but_ffn_fits=plan.complete,
        kv_cache_in_vram=plan.kv_halves == 2,
        ffn_bytes_in_vram=used,
        activation_share_on_gpu=captured_share(counts, chosen),
        neuron_share_on_gpu=sum(shares) / len(shares),
        layers=shares,
    )


def split_table(result: SplitResult) -> str:
    """Return a split as text."""
    layers = result.layers
    full, none = sum(share == 1 for share in layers), sum(share == 0 for share in layers)
    facts = {
        "gpu index": result.gpu_index,
        "run PowerInfer with": result.powerinfer_option,
        "all but the FFNs fits": "yes" if result.everything_but_ffn_fits else "no",
        "KV cache in VRAM": "yes" if result.kv_cache_in_vram else "no",
        "FFN bytes in VRAM": result.ffn_bytes_in_vram,
        "neurons on the GPU": f"{result.neuron_share_on_gpu:.1%}",
        "activations on the GPU": f"{result.activation_share_on_gpu:.1%}",
        "layers": f"{full} wholly on the GPU, {none} not at all, of {len(layers)}",
    }
    return fact_table(facts)
