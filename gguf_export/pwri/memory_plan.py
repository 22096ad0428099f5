"""What PowerInfer puts into VRAM under a budget, in its own order.

PowerInfer subtracts tensor after tensor from the budget, by kind first and by layer second:
attention with its norms, predictors, FFN norms, output. The first tensor that does not fit ends it,
whatever smaller ones follow. If the output norm fitted, the two halves of the KV cache follow, each
if it fits; FFN neurons come last, and only if every one of those tensors fitted. Source:
PowerInfer@d3ebd7c llama.cpp:get_offloading_level, buffered_tensor_allocator::flush,
llama_reserve_model_kv_cache and llm_load_sparse_model_tensors.

Counted are the bytes of the data (ggml.c:ggml_nbytes). What CUDA takes beyond them is counted
nowhere, neither there nor here: up to 511 elements of padding for a tensor whose rows are no
multiple of 512 (ggml-cuda.cu:ggml_cuda_transform_tensor_impl), the allocator's granularity, and the
compute buffers, for which PowerInfer keeps 256 MiB free if it is given no budget
(llama.cpp:llama_set_vram_budget).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from common.errors import EXPORT_AGAIN, ExportError
from common.units import GIB
from gguf_export.pwri.hyperparameters import Hyperparameters
from gguf_export.pwri.schema import STEMS, parse_name
from gguf_files.names import DOWN
from gguf_files.reader import TensorInfo

_KV_BYTES = {"f16": 2, "f32": 4}
_ORDER = {stem: number for number, stem in enumerate(STEMS)}

KEPT_FREE = 256 << 20
"""VRAM that PowerInfer leaves free if it is given no budget (llama.cpp:llama_set_vram_budget)."""

BUCKET_BYTES = 4
"""Bytes that a neuron takes in VRAM beside its rows: its number in `gpu_bucket`, an int32
(llama.cpp:llama_gpu_split_loader::load_gpu_idx_for_model). PowerInfer does not count it."""


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """What the user will run PowerInfer with.

    Attributes:
        budget: VRAM budget, bytes; see `vram_option` for what PowerInfer makes of it.
        n_layers: blocks of the model.
        kv_width: values that a token keeps in each half of a layer's cache: key/value heads times
            head size.
        n_ctx: tokens of context (`-c`). With 0 PowerInfer reserves nothing and then takes the
            model's own length, so it must be given.
        kv_type: `f16`, or `f32` with `--memory-f32`.
    """

    budget: int
    n_layers: int
    kv_width: int
    n_ctx: int = 512
    kv_type: str = "f16"

    def __post_init__(self) -> None:
        """Refuse a budget below zero and an empty context."""
        if self.budget < 0:
            raise ExportError(f"VRAM budget {self.budget}: expected at least 0 bytes")
        if self.n_ctx < 1:
            raise ExportError(f"context {self.n_ctx}: expected at least 1 token")

    @classmethod
    def of(
        cls, hyper: Hyperparameters, *, budget: int, n_ctx: int = 512, kv_type: str = "f16"
    ) -> MemorySettings:
        """Return the settings for a file of these sizes."""
        return cls(
            budget=budget,
            n_layers=hyper.n_layers,
            kv_width=hyper.n_kv_heads * hyper.head_dim,
            n_ctx=n_ctx,
            kv_type=kv_type,
        )

    @property
    def kv_half(self) -> int:
        """Bytes of all layers' keys, and as many of their values."""
        return self.n_layers * self.n_ctx * self.kv_width * _KV_BYTES[self.kv_type]


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Where PowerInfer puts a model.

    Attributes:
        offloaded: names of the tensors in VRAM besides FFN matrices, in PowerInfer's order.
        complete: all such tensors fit, so that FFN neurons may follow.
        kv_halves: halves of the KV cache in VRAM: 0, 1 (values alone) or 2.
        left: bytes of the budget that remain after all of this.
        bytes_per_neuron: VRAM of one neuron of each layer, bytes: its rows of gate (if there is
            one), up and down, and its entry in `gpu_bucket`.
    """

    offloaded: tuple[str, ...]
    complete: bool
    kv_halves: int
    left: int
    bytes_per_neuron: tuple[int, ...]

    @property
    def ffn_budget(self) -> int:
        """Bytes that neurons may take; PowerInfer reads no index unless all else fitted."""
        return self.left if self.complete else 0


def vram_option(budget: int) -> tuple[str, int]:
    """Return the value for PowerInfer's `--vram-budget` and the bytes that it makes of it.

    The option counts GiB in float32 (common/common.cpp:gpt_params_parse, llama.h); the product is
    cut to whole bytes (llama.cpp:llama_set_vram_budget); the value returned never gives more than
    `budget`.
    """
    value = np.float32(budget / GIB)
    if int(float(value) * GIB) > budget:
        value = np.nextafter(value, np.float32(0))
    return f"{float(value):.9g}", int(float(value) * GIB)


def plan_memory(tensors: Iterable[TensorInfo], settings: MemorySettings) -> MemoryPlan:
    """Follow PowerInfer's placement.

    Args:
        tensors: all tensors of the file, in any order.
        settings: budget and what else decides it.

    Raises:
        ExportError: a tensor that PowerInfer's sparse loader does not know, or a layer without its
            FFN matrices.
    """
    ranked, rows = _sort(tensors)
    left = settings.budget
    offloaded = []
    for tensor in ranked:
        if tensor.size > left:
            break
        left -= tensor.size
        offloaded.append(tensor.name)
    kv_halves = 0
    # One tensor of the output, which no layer has, is enough for PowerInfer to call all layers
    # offloaded (flush).
    if any(parse_name(name).layer is None for name in offloaded):
        kv_halves = min(2, left // settings.kv_half)
    return MemoryPlan(
        offloaded=tuple(offloaded),
        complete=len(offloaded) == len(ranked),
        kv_halves=kv_halves,
        left=left - kv_halves * settings.kv_half,
        bytes_per_neuron=tuple(_neuron_bytes(rows, settings.n_layers)),
    )


def _sort(tensors: Iterable[TensorInfo]) -> tuple[list[TensorInfo], dict[int, dict[str, int]]]:
    """Return the tensors that are placed whole, in order, and each layer's FFN row sizes."""
    ranked: list[tuple[tuple[int, int, int, bool], TensorInfo]] = []
    rows: dict[int, dict[str, int]] = {}
    for tensor in tensors:
        name = parse_name(tensor.name)
        stem, layer = name.known, name.layer or 0
        if stem is None:
            raise ExportError(f"tensor {tensor.name}: PowerInfer has no place for it", EXPORT_AGAIN)
        if stem.level is not None:
            rank = (stem.level, layer, _ORDER[name.stem], name.part == "bias")
            ranked.append((rank, tensor))
        elif name.neurons:
            rows.setdefault(layer, {})[name.stem] = tensor.size // tensor.shape[0]
    return [tensor for _, tensor in sorted(ranked, key=lambda item: item[0])], rows


def _neuron_bytes(rows: dict[int, dict[str, int]], n_layers: int) -> Iterator[int]:
    for layer in range(n_layers):
        found = rows.get(layer, {})
        if not {"ffn_up", DOWN} <= found.keys():
            raise ExportError(f"layer {layer} has no FFN matrices", EXPORT_AGAIN)
        yield sum(found.values()) + BUCKET_BYTES
