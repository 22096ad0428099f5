"""Which FFN neurons go to the GPU: those that are active most often, across all layers.

PowerInfer cannot take any number of a layer's neurons. Prompts of more than 100 tokens go through a
kernel that asserts that the GPU's rows of a split layer are a multiple of 32
(PowerInfer@d3ebd7c ggml-cuda.cu:ggml_cuda_op_mul_mat_transpose_gemm, called by ggml_cuda_axpy), and
for Q4_0 the kernel of a single token leaves out the rows after the last whole 256
(dequantize_axpy_sparse_vec_q4_0_cuda), in layers that are wholly on the GPU too. In F16, layers
that are wholly on one side have no such limit. So neurons are chosen in groups; within that the
choice is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gguf import GGMLQuantizationType


@dataclass(frozen=True)
class Groups:
    """In what groups a layer's neurons go to the GPU.

    Attributes:
        block: neurons of a group.
        rest: whether the last group of a layer may be smaller; else its neurons stay on the CPU.
    """

    block: int
    rest: bool = True

    def __post_init__(self) -> None:
        """Hold what callers rely on."""
        assert self.block > 0

    def allow(self, number: int, neurons: int) -> bool:
        """Tell whether PowerInfer can run a layer with `number` of its `neurons` on the GPU."""
        return number % self.block == 0 or (self.rest and number == neurons)

    def sizes(self, neurons: int) -> torch.Tensor:
        """Return the sizes of a layer's groups, (groups,) int64."""
        whole, rest = divmod(neurons, self.block)
        sizes = [self.block] * whole + ([rest] if rest and self.rest else [])
        return torch.tensor(sizes, dtype=torch.int64)


F16_GROUPS = Groups(32)
Q4_0_GROUPS = Groups(256, rest=False)


def groups_of(kind: GGMLQuantizationType) -> Groups:
    """Return the groups for FFN matrices of a type."""
    return Q4_0_GROUPS if kind is GGMLQuantizationType.Q4_0 else F16_GROUPS


def choose_neurons(
    counts: Sequence[torch.Tensor],
    bytes_per_neuron: Sequence[int],
    budget: int,
    *,
    groups: Groups = F16_GROUPS,
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
    assert len(counts) == len(bytes_per_neuron)
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
