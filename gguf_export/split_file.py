"""The GPU split of an exported file: which neurons PowerInfer keeps in VRAM under a budget."""

from __future__ import annotations

import os
from typing import Any

from gguf import GGUFValueType

from common.errors import ExportError, FormatError
from common.units import parse_size
from gguf_export.pwri.gpu_index import index_path, read_gpu_index, write_gpu_index
from gguf_export.pwri.gpu_split import captured_share, choose_neurons, groups_of, split_bytes
from gguf_export.pwri.memory_plan import MemorySettings, plan_memory, vram_option
from gguf_export.pwri.reader import GGUFFile
from gguf_export.pwri.statistics import read_statistics
from gguf_export.settings import SplitConfig


def split(config: SplitConfig) -> dict[str, Any]:
    """Write `FILE.generated.gpuidx`, which PowerInfer loads instead of running its own solver.

    Returns:
        A document: the index file, the option to run PowerInfer with, what fits, the share of all
        activations that falls on the GPU, and each layer's share of neurons there.

    Raises:
        PspError: a damaged file, no statistics, an existing index, or a refused write.
    """
    file = GGUFFile(config.file)
    if not file.sparse:
        raise FormatError(
            f"{config.file}: a dense file has no GPU split", "pass a *.powerinfer.gguf"
        )
    kind = file.value("general.architecture", GGUFValueType.STRING)

    def size(key: str) -> int:
        value: int = file.value(f"{kind}.{key}", GGUFValueType.UINT32)
        return value

    n_layers, d_model = size("block_count"), size("embedding_length")
    heads, kv_heads = size("attention.head_count"), size("attention.head_count_kv")
    if not 0 < n_layers <= len(file.tensors):
        raise file.error(f"{n_layers} layers are impossible")
    if not 0 < kv_heads <= heads <= d_model or d_model % heads:
        raise file.error(f"{heads} heads, {kv_heads} for keys, do not fit d_model {d_model}")
    option, granted = vram_option(parse_size(config.vram_budget))
    settings = MemorySettings(
        budget=granted,
        n_layers=n_layers,
        kv_width=kv_heads * (d_model // heads),
        n_ctx=config.context,
        kv_type="f32" if config.kv_type == "f32" else "f16",
    )
    plan = plan_memory(file.tensors.values(), settings)
    counts = read_statistics(config.file.parent, n_layers, size("feed_forward_length"))
    down = file.tensors.get("blk.0.ffn_down_t.weight")
    if down is None:
        raise file.error("tensor blk.0.ffn_down_t.weight is missing")
    groups = groups_of(down.kind)
    chosen = choose_neurons(counts, plan.bytes_per_neuron, plan.ffn_budget, groups=groups)
    used = split_bytes(chosen, plan.bytes_per_neuron)
    target = index_path(config.file)
    if not config.force and os.path.lexists(target):
        raise ExportError(f"{target} exists", "pass --force to replace it")
    write_gpu_index(target, chosen, used, groups)
    read_gpu_index(target, n_layers, size("feed_forward_length"), groups)  # verifies it
    return {
        "gpu_index": str(target),
        "powerinfer_option": f"--vram-budget {option}",
        "vram_budget_bytes": granted,
        "everything_but_ffn_fits": plan.complete,
        "kv_cache_in_vram": plan.kv_halves == 2,
        "ffn_bytes_in_vram": used,
        "activation_share_on_gpu": captured_share(counts, chosen),
        "neuron_share_on_gpu": sum(float(mask.double().mean()) for mask in chosen) / n_layers,
        "layers": [float(mask.double().mean()) for mask in chosen],
    }
