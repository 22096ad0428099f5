"""The neurons that PowerInfer's own solver would keep in VRAM, to hold `psp gpu-split` against.

It is an integer program over blocks of 256 neurons, each layer's sorted by frequency, whose optimum
is the top of all blocks; GLPK is not needed to find it. Sources: PowerInfer@d3ebd7c
llama.cpp:llm_load_gpu_split_with_budget, powerinfer-py/powerinfer/solver.py, export_split.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

UPSTREAM_BLOCK = 256
"""Neurons that it takes together; a d_ff that is no multiple of it stops the solver."""


def upstream_capacity(budget: int, d_ff: int) -> int:
    """Return how many neurons PowerInfer takes a budget for, in F16 with a gate.

    A slice has d_ff numbers where a row has d_model, and 4.5 matrices for four neurons.

    Args:
        budget: bytes left for neurons.
        d_ff: neurons in a layer.
    """
    return int(budget / int(2 * d_ff * 4.5)) * 4


def upstream_order(n_layers: int) -> list[int]:
    """Return whose statistics each layer's neurons are picked by: file names sorted as text."""
    return sorted(range(n_layers), key=lambda layer: f"activation_{layer}.pt")


def upstream_choice(
    counts: Sequence[torch.Tensor], budget: int, order: Sequence[int]
) -> list[torch.Tensor]:
    """Choose as upstream does.

    Args:
        counts: per layer, (d_ff,) int64, how often each neuron was active; d_ff a multiple of
            `UPSTREAM_BLOCK`.
        budget: bytes left for neurons, see `upstream_capacity`.
        order: whose statistics each layer takes, see `upstream_order`.

    Returns:
        Per layer, (d_ff,) bool, True for neurons on the GPU.
    """
    d_ff = len(counts[0])
    blocks = upstream_capacity(budget, d_ff) // UPSTREAM_BLOCK
    sums = torch.stack(
        [layer.sort(descending=True).values.reshape(-1, UPSTREAM_BLOCK).sum(1) for layer in counts]
    )
    best = torch.zeros_like(sums, dtype=torch.bool)
    best.view(-1)[sums.flatten().topk(min(blocks, sums.numel())).indices] = True
    chosen = []
    for layer, number in enumerate((UPSTREAM_BLOCK * best.sum(1)).tolist()):
        mask = torch.zeros(d_ff, dtype=torch.bool)
        mask[counts[order[layer]].topk(number).indices] = True
        chosen.append(mask)
    return chosen
