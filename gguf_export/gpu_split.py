"""The GPU split of an exported file: which neurons PowerInfer keeps in VRAM under a budget.

Those that are active most often, across all layers. They go in groups that PowerInfer's kernels can
take (`pwri.gpu_index`); within that the choice is exact.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import ExportError, FormatError
from common.lock import locked
from common.table import fact_table
from common.units import parse_size
from gguf_export.commit import finish_commit
from gguf_export.manifest import changed_output, check_outputs
from gguf_export.pwri.dense_layers import dense_layers
from gguf_export.pwri.gpu_index import (
    GROUPS,
    Groups,
    file_groups,
    index_path,
    read_gpu_index,
    write_gpu_index,
)
from gguf_export.pwri.hyperparameters import read_hyperparameters
from gguf_export.pwri.memory_plan import MemorySettings, plan_memory, vram_option
from gguf_export.pwri.statistics import ACTIVATION_DIRECTORY, read_statistics
from gguf_export.settings import SplitConfig
from gguf_files.reader import GGUFFile


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
    with locked(config.file, "FILE"):
        finish_commit(config.file)
        return _split(config)


def _split(config: SplitConfig) -> SplitResult:
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
    directory = config.file.parent if config.statistics is None else config.statistics
    if config.statistics is None and (directory / ACTIVATION_DIRECTORY).is_dir():
        check_outputs(
            config.file,
            [directory / ACTIVATION_DIRECTORY],
            "export again; or pass --statistics DIR if they are others on purpose",
        )
    counts = _computed(file, read_statistics(directory, hyper.n_layers, hyper.d_ff))
    groups = file_groups(file)
    chosen = choose_neurons(counts, plan.bytes_per_neuron, plan.ffn_budget, groups=groups)
    used = split_bytes(chosen, plan.bytes_per_neuron)
    target = index_path(config.file)
    if not config.force and os.path.lexists(target):
        raise ExportError(f"{target} exists", "pass --force to replace it")
    with changed_output(config.file, target):
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


def _computed(file: GGUFFile, counts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return counts in which neurons of dense layers are as hot as the hottest of all.

    Statistics of others know which neurons were active, not that all of these are computed.
    """
    dense, most = dense_layers(file), max(int(layer.max()) for layer in counts)
    return [torch.full_like(c, most) if n in dense else c for n, c in enumerate(counts)]


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


def choose_neurons(
    counts: Sequence[torch.Tensor],
    bytes_per_neuron: Sequence[int],
    budget: int,
    *,
    groups: Groups = GROUPS["f16"],
) -> list[torch.Tensor]:
    """Choose the neurons that fit the budget and are active most often.

    A layer's neurons are sorted by frequency and cut into groups. Groups are taken by activations
    per byte, equal ones by lower layer and then lower index; one that does not fit ends its layer.
    If all neurons cost the same and the groups' size divides d_ff, no other choice in such groups
    has more activations; with groups of 1 it is the exact top-k.

    Args:
        counts: per layer, (d_ff,) int64, how often each neuron was active.
        bytes_per_neuron: per layer, bytes of one neuron in VRAM.
        budget: bytes for all of them.
        groups: how many neurons of a layer go together.

    Returns:
        Per layer, (d_ff,) bool, True for neurons on the GPU.
    """
    assert min(bytes_per_neuron) > 0
    assert budget >= 0
    orders = [torch.sort(layer, descending=True, stable=True).indices for layer in counts]
    sizes = [groups.sizes(len(layer)) for layer in counts]
    sums = [
        _group_sums(layer[order], groups.block)[: len(size)]
        for layer, order, size in zip(counts, orders, sizes, strict=True)
    ]
    cost = [size * each for size, each in zip(sizes, bytes_per_neuron, strict=True)]
    layers = [torch.full_like(size, number) for number, size in enumerate(sizes)]
    taken = _take(torch.cat(sums), torch.cat(cost), torch.cat(layers), budget)
    numbers = torch.zeros(len(counts), dtype=torch.int64)
    numbers.index_add_(0, torch.cat(layers)[taken], torch.cat(sizes)[taken])
    chosen = []
    for order, number in zip(orders, numbers.tolist(), strict=True):
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[:number]] = True
        chosen.append(mask)
    return chosen


def _group_sums(sorted_counts: torch.Tensor, block: int) -> torch.Tensor:
    padding = -len(sorted_counts) % block
    padded = torch.nn.functional.pad(sorted_counts, (0, padding))
    return padded.reshape(-1, block).sum(dim=1)


def _take(
    gains: torch.Tensor, cost: torch.Tensor, layers: torch.Tensor, budget: int
) -> torch.Tensor:
    """Return the positions of the groups to take.

    Groups come in order of layer and, within one, of falling activations per byte. Quotients of
    integers below 2^53 keep their order in float64, so a layer's groups stay in order.

    Each round takes all groups up to the first that does not fit, whose layer is then closed.
    """
    order = torch.sort(gains.double() / cost, descending=True, stable=True).indices
    taken = []
    while len(order):
        spent = torch.cumsum(cost[order], dim=0)
        fitting = int(torch.searchsorted(spent, budget, right=True))
        taken.append(order[:fitting])
        if fitting == len(order):
            break
        budget -= int(spent[fitting - 1]) if fitting else 0
        closed = layers[order[fitting]]
        order = order[fitting + 1 :]
        order = order[layers[order] != closed]
        if len(order) and int(cost[order].min()) > budget:
            break
    return torch.cat(taken)


def split_bytes(chosen: Sequence[torch.Tensor], bytes_per_neuron: Sequence[int]) -> int:
    """Return the bytes that the chosen neurons take in VRAM."""
    return sum(
        int(layer.sum()) * each for layer, each in zip(chosen, bytes_per_neuron, strict=True)
    )


def captured_share(counts: Sequence[torch.Tensor], chosen: Sequence[torch.Tensor]) -> float:
    """Return the share of all activations that chosen neurons account for.

    Args:
        counts: per layer, (d_ff,) int64.
        chosen: per layer, (d_ff,) bool.

    Returns:
        A fraction; 0 if no neuron was ever active.
    """
    total = sum(int(layer.sum()) for layer in counts)
    captured = sum(int(layer[mask].sum()) for layer, mask in zip(counts, chosen, strict=True))
    return captured / total if total else 0.0
