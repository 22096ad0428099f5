"""GPU indexes beside a file: psp's own, one that knows nothing, and the one upstream would make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.hybrid_vram import CONTEXT, plan_of
from benchmarks.upstream_split import upstream_choice, upstream_order
from gguf_export.gpu_split import captured_share, choose_neurons, split, split_bytes
from gguf_export.pwri.gpu_index import file_groups, index_path, write_gpu_index
from gguf_export.pwri.hyperparameters import read_hyperparameters
from gguf_export.pwri.statistics import read_statistics
from gguf_export.settings import SplitConfig
from gguf_files.reader import GGUFFile

Chosen = list[torch.Tensor]
"""Per layer, (d_ff,) bool, True for neurons on the card."""


def place(file: Path, budget: int) -> float:
    """Write psp's index for a budget beside a file, as `psp gpu-split` does.

    Returns:
        The share of all activations that falls on the card, by the statistics.
    """
    settings = SplitConfig(
        file=file, vram_budget=str(budget), context=CONTEXT, force=True, least_budget=0
    )
    return split(settings).activation_share_on_gpu


def scatter(file: Path, budget: int) -> float:
    """Write an index of as many neurons drawn by chance; return as `place` does."""
    counts = counts_of(file)
    source = torch.Generator().manual_seed(0)
    chosen = choose(file, budget, [torch.rand(len(each), generator=source) for each in counts])
    write(file, chosen, split_bytes(chosen, plan_of(file, budget).bytes_per_neuron))
    return captured_share(counts, chosen)


def choose(file: Path, budget: int, counts: Sequence[torch.Tensor]) -> Chosen:
    """Return psp's choice by any counts, (d_ff,) per layer."""
    plan = plan_of(file, budget)
    groups = file_groups(GGUFFile(file))
    return choose_neurons(counts, plan.bytes_per_neuron, plan.ffn_budget, groups=groups)


def choose_upstream(file: Path, budget: int) -> Chosen:
    """Return upstream's choice by the statistics beside a file in F16."""
    counts = counts_of(file)
    return upstream_choice(counts, plan_of(file, budget).ffn_budget, upstream_order(len(counts)))


def write(file: Path, chosen: Chosen, needed: int) -> None:
    """Write an index that asks for so many bytes, whatever its neurons take."""
    write_gpu_index(index_path(file), chosen, needed, file_groups(GGUFFile(file)))


def counts_of(file: Path) -> list[torch.Tensor]:
    """Return how often each neuron was active, per layer (d_ff,) int64."""
    hyper = read_hyperparameters(GGUFFile(file))
    return read_statistics(file.parent, hyper.n_layers, hyper.d_ff)
