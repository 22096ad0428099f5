"""Which device holds what, in bytes, and how much of the work falls on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.errors import FormatError
from common.hot_neurons import SHARES, hot_neuron_curve
from common.machine import Gpu
from gguf_export.gpu_split import captured_share, split_bytes
from gguf_export.pwri.gpu_index import file_groups, index_path, read_gpu_index
from gguf_export.pwri.hyperparameters import Hyperparameters
from gguf_export.pwri.memory_plan import (
    BUCKET_BYTES,
    KEPT_FREE,
    MemoryPlan,
    MemorySettings,
    plan_memory,
    vram_option,
)
from gguf_export.pwri.schema import Role, parse_name
from gguf_export.pwri.statistics import ACTIVATION_DIRECTORY, read_statistics
from gguf_files.reader import GGUFFile
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.programs.sample import ProgramFacts
from results.bench import BenchLayer, Device, Placement
from results.parts import HotNeurons, Layer

_PARTS: dict[Role, str] = {
    "embedding": "embedding",
    "attention": "attention",
    "predictor": "predictors",
    "norm": "norms",
    "output": "output",
    "ffn": "ffn_neurons",
}
PLACED_PARTS = (*list(_PARTS.values())[:-1], "kv_cache", "ffn_neurons")


@dataclass(frozen=True, kw_only=True)
class NeuronFacts:
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


def read_neuron_facts(file: GGUFFile, hyper: Hyperparameters) -> NeuronFacts:
    """Read `activation/` and the GPU index beside a file, each if it is there and may be its own.

    Raises:
        PredictorError: statistics that are damaged or another model's.
    """
    directory, index = file.path.parent, index_path(file.path)
    counts = None
    if hyper.skips_neurons and (directory / ACTIVATION_DIRECTORY).is_dir():
        counts = read_statistics(directory, hyper.n_layers, hyper.d_ff)
    if not index.is_file():
        return NeuronFacts(counts=counts)
    try:
        chosen, capacity = read_gpu_index(index, hyper.n_layers, hyper.d_ff, file_groups(file))
    except FormatError as error:
        return NeuronFacts(counts=counts, problem=str(error))
    return NeuronFacts(counts=counts, chosen=chosen, capacity=capacity)


def frequency_curve(neurons: NeuronFacts) -> HotNeurons | None:
    """Return which share of all activations the most active neurons make, all layers together.

    Returns:
        Both shares at every per cent of neurons, and where the GPU's choice lies; None without
        statistics.
    """
    if neurons.counts is None:
        return None
    on_gpu = neurons.chosen
    return HotNeurons(
        neuron_share=SHARES,
        activation_share=hot_neuron_curve(torch.cat(list(neurons.counts))) or (0.0,) * len(SHARES),
        gpu_neuron_share=None if on_gpu is None else float(torch.cat(list(on_gpu)).double().mean()),
        gpu_activation_share=None if on_gpu is None else captured_share(neurons.counts, on_gpu),
    )


def place_layer(layer: Layer, neurons: NeuronFacts) -> BenchLayer:
    """Return a layer with the shares of its neurons and activations on the GPU, as far as known."""
    if neurons.chosen is None:
        return BenchLayer(**vars(layer))
    mask, counts = neurons.chosen[layer.layer], neurons.counts
    return BenchLayer(
        **vars(layer),
        activation_share_on_gpu=captured_share([counts[layer.layer]], [mask]) if counts else None,
        neuron_share_on_gpu=float(mask.double().mean()),
    )


def vram_budget(config: BenchConfig, facts: ProgramFacts | None, gpus: Sequence[Gpu]) -> int | None:
    """Return the VRAM that PowerInfer takes, None where it uses no GPU or does not run.

    Args:
        config: settings.
        facts: what this PowerInfer is.
        gpus: of this machine.
    """
    if facts is None or facts.cuda is False:
        return None
    if config.vram_budget_bytes is not None:
        return vram_option(config.vram_budget_bytes)[1]
    if facts.cuda and gpus:
        return max(0, gpus[0].free - KEPT_FREE)
    return None


def place(
    file: GGUFFile, hyper: Hyperparameters, neurons: NeuronFacts, budget: int | None, room: int
) -> Placement:
    """Return the bytes of each part on each device.

    Neurons on the GPU are those of the index if there is room for it. Else PowerInfer's own solver
    chooses, and is taken to fill what is left; without statistics it puts none there.

    Args:
        file: the sparse file.
        hyper: its sizes.
        neurons: the index.
        budget: VRAM, bytes; None for the CPU alone.
        room: tokens of context of the runs.
    """
    settings = MemorySettings.of(hyper, budget=budget or 0, n_ctx=room)
    plan = plan_memory(file.tensors.values(), settings)
    total, gpu = dict.fromkeys(PLACED_PARTS, 0), dict.fromkeys(PLACED_PARTS, 0)
    for name, info in file.tensors.items():
        role = parse_name(name).role
        assert role is not None, "the plan knows every tensor"
        total[_PARTS[role]] += info.size
        gpu[_PARTS[role]] += info.size if name in plan.offloaded else 0
    total["kv_cache"] = 2 * settings.kv_half
    gpu["kv_cache"] = plan.kv_halves * settings.kv_half
    gpu["ffn_neurons"], moved = _neurons(plan, neurons, hyper.d_ff)
    cpu = {part: total[part] - gpu[part] for part in PLACED_PARTS}
    cpu["ffn_neurons"] = total["ffn_neurons"] - moved
    devices = [Device(name="CPU", bytes=cpu)]
    if budget is not None:
        devices.append(Device(name="GPU", bytes=gpu))
    return Placement(budget_bytes=budget, devices=tuple(devices))


def _neurons(plan: MemoryPlan, neurons: NeuronFacts, d_ff: int) -> tuple[int, int]:
    """Return the bytes that neurons take on the GPU, and those that the CPU need not read."""
    rows = [each - BUCKET_BYTES for each in plan.bytes_per_neuron]
    if neurons.chosen is not None and neurons.capacity <= plan.ffn_budget:
        return split_bytes(neurons.chosen, plan.bytes_per_neuron), split_bytes(neurons.chosen, rows)
    if neurons.counts is None:
        return 0, 0
    taken = min(plan.ffn_budget, d_ff * sum(plan.bytes_per_neuron))
    return taken, taken * sum(rows) // sum(plan.bytes_per_neuron)
