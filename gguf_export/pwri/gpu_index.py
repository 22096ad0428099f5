"""The `.generated.gpuidx` file beside a model: which FFN neurons PowerInfer keeps in VRAM.

PowerInfer@d3ebd7c llama.cpp:llm_load_gpu_split_with_budget opens it unless `--reset-gpu-index` is
given, in builds with CUDA only. llama_gpu_split_loader refuses it if `split.vram_capacity` exceeds
what is left of the budget or if it holds other than two tensors a layer. Names and sizes are not
checked: tensors are taken by position. After a refusal PowerInfer runs its own solver, which writes
over the file, if there are statistics beside it, and else leaves all neurons on the CPU.

A layer without neurons on the GPU has an empty bucket, a tensor of no elements. ggml reads those,
and the loader drops the bucket of such a layer and of one that is wholly on the GPU (by the sum of
`gpu_idx`): the first runs on the CPU alone, the matrices of the second are moved whole.

PowerInfer cannot take any number of a layer's neurons. Prompts of more than 100 tokens go through a
kernel that asserts that the GPU's rows of a split layer are a multiple of 32
(ggml-cuda.cu:ggml_cuda_op_mul_mat_transpose_gemm, called by ggml_cuda_axpy), and for Q4_0 the
kernel of a single token leaves out the rows after the last whole 256
(dequantize_axpy_sparse_vec_q4_0_cuda), in layers that are wholly on the GPU too. In F16, layers
that are wholly on one side have no such limit.

For the same choice the bytes are those of powerinfer-py/powerinfer/export_split.py:export_split.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from common.element_types import ELEMENT_TYPES
from common.errors import ExportError
from common.files import atomic_path
from gguf_files.names import DOWN
from gguf_files.reader import SPARSE_MAGIC, GGUFFile, TensorInfo

INDEX_SUFFIX = ".generated.gpuidx"
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


@dataclass(frozen=True)
class Groups:
    """In what groups a layer's neurons go to the GPU.

    Attributes:
        block: neurons of a group.
        rest: whether the last group of a layer may be smaller; else its neurons stay on the CPU.
    """

    block: int
    rest: bool = True

    def problem(self, layer: int, mask: torch.Tensor) -> str | None:
        """Return why PowerInfer cannot run a layer with the neurons in (d_ff,) bool on the GPU."""
        number, neurons = int(mask.sum()), len(mask)
        if number % self.block == 0 or (self.rest and number == neurons):
            return None
        whole = f" or all {neurons}" if self.rest else ""
        return (
            f"layer {layer} has {number} neurons on the GPU; PowerInfer's CUDA kernels need a "
            f"multiple of {self.block}{whole}"
        )

    def sizes(self, neurons: int) -> torch.Tensor:
        """Return the sizes of a layer's groups, (groups,) int64."""
        whole, rest = divmod(neurons, self.block)
        sizes = [self.block] * whole + ([rest] if rest and self.rest else [])
        return torch.tensor(sizes, dtype=torch.int64)


GROUPS = {name: Groups(each.gpu_block, each.gpu_rest) for name, each in ELEMENT_TYPES.items()}
"""By the type of the FFN's matrices."""


def index_path(model_file: Path) -> Path:
    """Return where PowerInfer looks for a model's index."""
    return model_file.with_name(model_file.name + INDEX_SUFFIX)


def file_groups(file: GGUFFile) -> Groups:
    """Return what PowerInfer's kernels need for the type of a file's FFN."""
    down = file.tensors.get(f"blk.0.{DOWN}.weight")
    return GROUPS.get("f16" if down is None else down.kind.name.lower(), GROUPS["f16"])


def write_gpu_index(
    path: Path, chosen: Sequence[torch.Tensor], vram_capacity: int, groups: Groups = GROUPS["f16"]
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
    tensors: dict[str, npt.NDArray[np.int32]] = {}
    for layer, mask in enumerate(chosen):
        problem = groups.problem(layer, mask)
        if problem is not None:
            raise ExportError(problem, "choose them in groups")
        on_gpu = mask.numpy()
        tensors[INDEX.format(layer=layer)] = on_gpu.astype("<i4")
        tensors[BUCKET.format(layer=layer)] = np.flatnonzero(on_gpu).astype("<i4")
    with atomic_path(path) as part, closing(GGUFWriter(part, INDEX_ARCHITECTURE)) as writer:
        writer.add_block_count(len(chosen))
        writer.add_uint64(CAPACITY_KEY, vram_capacity)
        for name, data in tensors.items():
            writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, POWERINFER_I32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        for data in tensors.values():
            file.write(data.tobytes())
            writer.write_padding(file, data.nbytes)
        file.seek(0)
        file.write(SPARSE_MAGIC)


class IndexFile(GGUFFile):
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
    path: Path, n_layers: int, d_ff: int, groups: Groups = GROUPS["f16"]
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
    file = IndexFile(path)
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
        problem = groups.problem(layer, mask)
        if problem is not None:
            raise file.error(problem)
    return chosen, int(file.value(CAPACITY_KEY, GGUFValueType.UINT64))


def _layer(file: GGUFFile, layer: int, d_ff: int) -> torch.Tensor:
    index = file.tensor(INDEX.format(layer=layer))
    bucket = file.tensor(BUCKET.format(layer=layer))
    if index.shape != (d_ff,):
        raise file.error(f"layer {layer} has {index.size} neurons, expected {d_ff}")
    if not np.isin(index, (0, 1)).all() or not np.array_equal(np.flatnonzero(index), bucket):
        raise file.error(f"gpu_idx and gpu_bucket of layer {layer} contradict each other")
    return torch.from_numpy(np.asarray(index == 1))
