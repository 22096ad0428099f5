"""The `.generated.gpuidx` file beside a model: which FFN neurons PowerInfer keeps in VRAM.

PowerInfer@d3ebd7c llama.cpp:llm_load_gpu_split_with_budget opens it unless `--reset-gpu-index` is
given, in builds with CUDA only. llama_gpu_split_loader refuses it if `split.vram_capacity` exceeds
what is left of the budget or if it holds other than two tensors a layer. Names and sizes are not
checked: tensors are taken by position. After a refusal PowerInfer runs its own solver, which writes
over the file, if there are statistics beside it, and else leaves all neurons on the CPU.

A layer without neurons on the GPU has an empty bucket, a tensor of no elements. ggml reads those,
and the loader drops the bucket of such a layer and of one that is wholly on the GPU (by the sum of
`gpu_idx`): the first runs on the CPU alone, the matrices of the second are moved whole.

For the same choice the bytes are those of powerinfer-py/powerinfer/export_split.py:export_split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from common.errors import ExportError
from common.files import atomic_path
from gguf_export.pwri.gpu_split import F16_GROUPS, Groups, groups_of
from gguf_export.pwri.reader import GGUFFile, TensorInfo
from gguf_export.pwri.schema import ALIGNMENT, DOWN, SPARSE_MAGIC

INDEX_ARCHITECTURE = "generic.gpu_index"
CAPACITY_KEY = "split.vram_capacity"
"""uint64, bytes of VRAM that the neurons need."""

INDEX = "blk.{layer}.gpu_idx"
"""int32 (d_ff,): 1 for neurons on the GPU, else 0."""

BUCKET = "blk.{layer}.gpu_bucket"
"""int32: the numbers of the neurons on the GPU, rising."""

POWERINFER_I32 = GGMLQuantizationType(18)
"""PowerInfer's number of int32 (ggml.h:ggml_type). GGUF gave it to a quantised type later, under
whose name the `gguf` package knows it, and moved int32 to 26, which PowerInfer crashes on."""


def index_path(model_file: Path) -> Path:
    """Return where PowerInfer looks for a model's index."""
    return model_file.with_name(f"{model_file.name}.generated.gpuidx")


def file_groups(file: GGUFFile) -> Groups:
    """Return what PowerInfer's kernels need for the type of a file's FFN."""
    down = file.tensors.get(f"blk.0.{DOWN}.weight")
    return F16_GROUPS if down is None else groups_of(down.kind)


def write_gpu_index(
    path: Path,
    chosen: Sequence[torch.Tensor],
    vram_capacity: int,
    groups: Groups = F16_GROUPS,
) -> None:
    """Write an index, whole or not at all.

    Args:
        path: final name, see `index_path`.
        chosen: per layer, (d_ff,) bool, True for neurons on the GPU.
        vram_capacity: bytes of VRAM that they need; PowerInfer takes the index if it has as many.

        groups: what PowerInfer's kernels need for the type of the model's FFN.

    Raises:
        ExportError: a layer's number of neurons on the GPU is one that PowerInfer cannot run.
        OutputError: the system refused a write.
    """
    for layer, mask in enumerate(chosen):
        _check(layer, mask, groups)
    tensors = list(_tensors(chosen))
    with atomic_path(path) as part:
        _write_header(part, tensors, vram_capacity)
        with part.open("r+b") as file:
            file.write(SPARSE_MAGIC)
            file.seek(0, 2)
            file.write(bytes(-file.tell() % ALIGNMENT))
            for _, data in tensors:
                file.write(data.tobytes())
                file.write(bytes(-data.nbytes % ALIGNMENT))


def _check(layer: int, mask: torch.Tensor, groups: Groups) -> None:
    assert mask.dtype == torch.bool
    assert mask.dim() == 1
    number = int(mask.sum())
    if not groups.allow(number, len(mask)):
        raise ExportError(f"{_refusal(layer, number, len(mask), groups)}", "choose them in groups")


def _refusal(layer: int, number: int, neurons: int, groups: Groups) -> str:
    whole = f" or all {neurons}" if groups.rest else ""
    return (
        f"layer {layer} has {number} neurons on the GPU; PowerInfer's CUDA kernels need a multiple "
        f"of {groups.block}{whole}"
    )


def _tensors(chosen: Sequence[torch.Tensor]) -> Iterator[tuple[str, npt.NDArray[np.int32]]]:
    for layer, mask in enumerate(chosen):
        on_gpu = mask.numpy()
        yield INDEX.format(layer=layer), on_gpu.astype("<i4")
        yield BUCKET.format(layer=layer), np.flatnonzero(on_gpu).astype("<i4")


def _write_header(
    path: Path, tensors: Sequence[tuple[str, npt.NDArray[np.int32]]], vram_capacity: int
) -> None:
    writer = GGUFWriter(path, INDEX_ARCHITECTURE)
    try:
        writer.add_block_count(len(tensors) // 2)
        writer.add_uint64(CAPACITY_KEY, vram_capacity)
        for name, data in tensors:
            writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, POWERINFER_I32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


class _IndexFile(GGUFFile):
    """A file with PowerInfer's int32, in which vectors may be empty."""

    def _place(
        self, infos: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]]
    ) -> dict[str, TensorInfo]:
        for name, _, kind, _ in infos:
            if kind is not POWERINFER_I32:
                raise self.error(f"tensor {name} has type {kind:d}, expected {POWERINFER_I32:d}")
        whole = GGMLQuantizationType.I32
        filled = super()._place([(n, s, whole, at) for n, s, _, at in infos if s != (0,)])
        tensors: dict[str, TensorInfo] = {}
        for name, shape, _, _ in infos:
            if name in tensors:
                raise self.error(f"tensor {name} appears twice")
            tensors[name] = filled.get(name) or TensorInfo(name, shape, whole, 0, 0)
        return tensors


def read_gpu_index(
    path: Path, n_layers: int, d_ff: int, groups: Groups = F16_GROUPS
) -> tuple[list[torch.Tensor], int]:
    """Read an index and check it against the model.

    Args:
        path: see `index_path`.
        n_layers: the model's blocks.
        d_ff: their neurons.
        groups: what PowerInfer's kernels need for the type of the model's FFN.

    Returns:
        Per layer, (d_ff,) bool, True for neurons on the GPU; and the bytes of VRAM they need.

    Raises:
        FormatError: damaged, of another model, or one that PowerInfer would refuse or misread.
    """
    file = _IndexFile(path)
    if not file.sparse:
        raise file.error("starts as a dense model file")
    architecture = file.value("general.architecture", GGUFValueType.STRING)
    if architecture != INDEX_ARCHITECTURE:
        raise file.error(f"general.architecture is {architecture}, expected {INDEX_ARCHITECTURE}")
    expected = [name.format(layer=n) for n in range(n_layers) for name in (INDEX, BUCKET)]
    if list(file.tensors) != expected:
        raise file.error(f"holds other tensors than gpu_idx and gpu_bucket of {n_layers} layers")
    chosen = [_layer(file, layer, d_ff) for layer in range(n_layers)]
    for layer, mask in enumerate(chosen):
        if not groups.allow(number := int(mask.sum()), d_ff):
            raise file.error(_refusal(layer, number, d_ff, groups))
    return chosen, int(file.value(CAPACITY_KEY, GGUFValueType.UINT64))


def _layer(file: GGUFFile, layer: int, d_ff: int) -> torch.Tensor:
    index = file.tensor(INDEX.format(layer=layer))
    bucket = file.tensor(BUCKET.format(layer=layer))
    if index.shape != (d_ff,):
        raise file.error(f"layer {layer} has {index.size} neurons, expected {d_ff}")
    if not np.isin(index, (0, 1)).all() or not np.array_equal(np.flatnonzero(index), bucket):
        raise file.error(f"gpu_idx and gpu_bucket of layer {layer} contradict each other")
    return torch.from_numpy(np.asarray(index == 1))
