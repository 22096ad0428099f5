"""Seconds for each decoded token: bytes over bandwidth, device by device.

The roofline model (Williams, Waterman, Patterson 2009) below its ridge: with one token at a time
every weight is used once, so time is bytes / bandwidth. What it leaves out is put into explicit
parameters: the share of the bandwidth that kernels reach, a time for each layer, one for each
token, and one for each copy over the link.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cost_model.hardware import Device, Hardware
from cost_model.model_bytes import (
    FLOAT_BYTES,
    Activity,
    LayerBytes,
    LayerPlace,
    ModelBytes,
    Place,
    dense_offload,
)

PARTS = ("attention", "predictor", "ffn_hot", "ffn_cold", "head", "link", "overhead", "overlap")
"""Parts of a token's time; they add up to it. `ffn_hot` are neurons that a GPU computes, `ffn_cold`
those that the CPU does; `overlap` is the time in which both work, counted once too often."""

_DEVICES = ("CPU", "GPU", "link")

HALF = 0.5
"""Attention and FFN take half of a layer's overhead each (assumed)."""


@dataclass
class Cost:
    """What a token costs.

    Attributes:
        parts: seconds by part.
        devices: seconds in which each of `CPU`, `GPU` and `link` is busy.
        read: bytes that each of `CPU` and `GPU` reads, and that cross the `link`.
    """

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    devices: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_DEVICES, 0.0))
    read: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_DEVICES, 0.0))

    @property
    def seconds(self) -> float:
        """Seconds of a token."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Its inverse."""
        return 1 / self.seconds

    def add(self, part: str, device: str, seconds: float, read: float = 0.0) -> None:
        """Add work of a device."""
        self.parts[part] += seconds
        self.devices[device] += seconds
        self.read[device] += read


@dataclass(frozen=True)
class Crossing:
    """Copies over the link.

    Attributes:
        size: bytes of all of them.
        copies: their number.
    """

    size: float = 0.0
    copies: float = 0.0

    def __add__(self, other: Crossing) -> Crossing:
        """Return both."""
        return Crossing(self.size + other.size, self.copies + other.copies)


@dataclass(frozen=True)
class _Machine:
    """Adds work of either device to a cost."""

    hardware: Hardware
    cost: Cost

    def device(self, name: str) -> Device:
        gpu = self.hardware.gpu
        if name == "CPU":
            return self.hardware.cpu
        assert gpu is not None, "nothing lies in VRAM without a GPU"
        return gpu

    def dense(self, part: str, name: str, size: float) -> None:
        """Add a dense product."""
        if size:
            self.cost.add(part, name, self.device(name).seconds(matrix=size), size)

    def overhead(self, name: str, halves: float) -> None:
        """Add halves of a sparse layer's overhead."""
        self.cost.add("overhead", name, HALF * halves * self.device(name).layer_seconds)

    def dense_overhead(self, name: str) -> None:
        """Add a dense layer's overhead."""
        device = self.device(name)
        told = device.dense_layer_seconds
        self.cost.add("overhead", name, device.layer_seconds if told is None else told)

    def cross(self, crossing: Crossing) -> None:
        """Add copies."""
        link = self.hardware.link
        if link is not None and crossing != Crossing():
            seconds = link.seconds(crossing.size, crossing.copies)
            self.cost.add("link", "link", seconds, crossing.size)


def sparse_token(
    model: ModelBytes,
    place: Place,
    hardware: Hardware,
    activities: Sequence[Activity],
    position: float,
) -> Cost:
    """Return what a token costs in PowerInfer's sparse graph.

    Layer by layer: attention and predictor where they lie, one after the other; then the FFN's hot
    neurons on the GPU and its cold ones on the CPU at the same time, so that the slower counts,
    gate and up first, down once both halves of these are merged
    (PowerInfer@d3ebd7c llama.cpp:llm_build_ffn_sparse, ggml.c:ggml_graph_compute_thread_hybrid).

    Args:
        model: bytes.
        place: what lies in VRAM.
        hardware: the machine.
        activities: by layer, what is computed.
        position: tokens in the cache.
    """
    machine = _Machine(hardware, Cost())
    for layer, there, activity in zip(model.layers, place.layers, activities, strict=True):
        _split(machine, "attention", layer.attention, there.attention)
        _split(machine, "attention", model.kv(position), place.kv)
        machine.dense("predictor", _name(there.fc1 or there.attention == 1), layer.fc1)
        machine.dense("predictor", _name(there.fc2), layer.fc2)
        machine.overhead(_name(there.attention == 1), 1)
        _ffn(machine, layer, there, activity)
        machine.cross(layer_crossing(layer, there, model.d_model, place.kv))
    machine.dense("head", _name(place.head), model.head)
    _ends(machine, model, any(there.attention for there in place.layers), place.head)
    machine.cost.add("overhead", "CPU", hardware.token_seconds)
    return machine.cost


def _name(on_gpu: bool) -> str:
    return "GPU" if on_gpu else "CPU"


def _split(machine: _Machine, part: str, size: float, share: float) -> None:
    machine.dense(part, "GPU", size * share)
    machine.dense(part, "CPU", size * (1 - share))


def _ffn(machine: _Machine, layer: LayerBytes, place: LayerPlace, activity: Activity) -> None:
    stages = (
        ("rows", layer.d_ff * layer.neuron_rows, activity.predicted),
        ("columns", layer.d_ff * layer.neuron_column, activity.both),
    )
    for kind, size, computed in stages:
        hot = place.hot(computed)
        seconds = []
        for name, part, share in (("GPU", "ffn_hot", hot), ("CPU", "ffn_cold", computed - hot)):
            if place.neurons == 0 and name == "GPU":
                continue
            read = max(0.0, share) * size
            seconds.append(machine.device(name).seconds(**{kind: read}))
            machine.cost.add(part, name, seconds[-1], read)
        if len(seconds) == 2:
            machine.cost.parts["overlap"] -= min(seconds)
    if place.neurons < 1:
        machine.overhead("CPU", 1)
    if place.neurons > 0:
        machine.overhead("GPU", 1)


def vectors(length: float, copies: float = 1) -> Crossing:
    """Return `copies` copies of an F32 vector."""
    return Crossing(copies * length * FLOAT_BYTES, copies)


def layer_crossing(layer: LayerBytes, place: LayerPlace, d_model: int, kv: float) -> Crossing:
    """Return what one layer of the sparse graph copies over the link for a token.

    Source: PowerInfer@d3ebd7c llama.cpp:build_llama_variants, llm_build_ffn_sparse,
    llm_build_sparse_mul_mat, llm_build_sparse_axpy, and ggml-cuda.cu:ggml_cuda_op_mul_mat and
    ggml_cuda_op_flatten, which copy whatever operand or result is not where the operation runs. It
    was read there, not run.

    Args:
        layer: its bytes.
        place: where they lie.
        d_model: hidden size.
        kv: share of the KV cache in VRAM.
    """
    if place.attention == 0:
        return Crossing()
    if place.attention < 1:
        # Some matrices here, some there: in and out of the GPU once.
        return vectors(d_model, 2)
    total = Crossing()
    if kv < 1:
        # Queries, keys and values leave for the cache, the attended values come back.
        total += vectors(d_model, 4)
    if layer.fc1 and not place.fc1:
        # ggml_cuda_mul_mat runs where the input lies, so the weights come over, token by token.
        total += Crossing(layer.fc1, 1) + vectors(layer.fc1 / (2 * d_model))
    if place.neurons == 1:
        return total
    # The FFN's norm is computed on the GPU, in two operations whose results belong to the CPU.
    total += vectors(d_model, 3)
    if place.fc2:
        total += vectors(layer.d_ff)  # the predictor's logits
    if place.neurons == 0:
        return total + vectors(d_model)  # the FFN's output goes to the residual
    inputs = 2 if layer.gated else 1
    # Gate and up: input to the GPU; both halves are added there, so the CPU's goes and the sum
    # comes. The activations go to the GPU's axpy, the CPU's half of its result to the sum.
    total += vectors(d_model, inputs) + vectors(layer.d_ff, 2 * inputs)
    total += vectors(layer.d_ff) + vectors(d_model)
    # The kernels read the logits of their rows where they lie, in the CPU's memory.
    return total + Crossing((inputs + 1) * place.neurons * layer.d_ff * FLOAT_BYTES, 0)


def _ends(machine: _Machine, model: ModelBytes, layers: bool, head: bool) -> None:
    """Add the embedding's way to the GPU and the logits' (or the last layer's) way back."""
    if layers:
        machine.cross(vectors(model.d_model))
    if layers or head:
        machine.cross(vectors(model.n_vocab if head else model.d_model))


def dense_token(model: ModelBytes, n_gpu_layers: int, hardware: Hardware, position: float) -> Cost:
    """Return what a token costs in a dense engine with whole layers offloaded.

    The engine is one that costs hardly anything beside its layers, as llama.cpp is; PowerInfer's
    own dense mode costs `token_seconds` more.

    Args:
        model: bytes; predictors are not read.
        n_gpu_layers: as `dense_offload` returns it.
        hardware: the machine.
        position: tokens in the cache.
    """
    machine = _Machine(hardware, Cost())
    first = len(model.layers) - n_gpu_layers
    for number, layer in enumerate(model.layers):
        gpu = number >= first
        name, part = _name(gpu), "ffn_hot" if gpu else "ffn_cold"
        machine.dense("attention", name, layer.attention + model.kv(position))
        machine.dense(part, name, layer.ffn)
        machine.dense_overhead(name)
    head = n_gpu_layers > len(model.layers)
    machine.dense("head", _name(head), model.head)
    _ends(machine, model, n_gpu_layers > 0, head)
    return machine.cost


def best_dense(
    model: ModelBytes, hardware: Hardware, budget: float, context: int, position: float
) -> tuple[int, Cost]:
    """Return the largest `-ngl` that fits, and what a token then costs."""
    count = dense_offload(model, budget, context) if hardware.gpu else 0
    return count, dense_token(model, count, hardware, position)
