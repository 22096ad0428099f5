"""Writing of PWRI files, a few pieces of a tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, RopeScalingType
from tqdm import tqdm

from architectures.rope import RopeScaling
from architectures.spec import Architecture, ModelShape
from common.errors import ExportError
from common.overlap import flushed_meanwhile, made_ahead
from gguf_export.pwri.element_types import FileTypes, encode
from gguf_export.pwri.schema import SPARSE_MAGIC
from gguf_export.tensors import PlannedTensor
from gguf_export.tokens.vocabulary import Vocabulary, add_vocabulary

_PIECE = 1 << 20
"""Numbers that are converted at once."""

_SCALING_TYPES = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN}


def write_file(
    path: Path,
    *,
    architecture: Architecture,
    model: ModelShape,
    name: str,
    vocabulary: Vocabulary,
    keys: Mapping[str, float | str],
    tensors: Sequence[PlannedTensor],
    types: FileTypes,
    sparse: bool,
) -> None:
    """Write a PWRI file, which PowerInfer runs sparsely, or a GGUF file, which it runs densely.

    Args:
        path: where to write it, a temporary name.
        architecture: the model's family.
        model: its sizes.
        name: `general.name`.
        vocabulary: its tokenizer.
        keys: further keys, written as float32 or string.
        tensors: what to write, in order.
        types: of their elements.
        sparse: which of the two.

    Raises:
        OSError: the system refused a write.
        ExportError: a weight does not fit float16.
    """
    writer = GGUFWriter(path, architecture.gguf_name)
    try:
        _add_model_keys(writer, architecture, model, name)
        add_vocabulary(writer, vocabulary)
        _add_types(writer, types)
        for key, value in keys.items():
            add = writer.add_string if isinstance(value, str) else writer.add_float32
            add(key, value)
        _write(writer, tensors)
    finally:
        writer.close()
    if sparse:
        with path.open("r+b") as file:
            file.write(SPARSE_MAGIC)


def _add_model_keys(
    writer: GGUFWriter, architecture: Architecture, model: ModelShape, name: str
) -> None:
    """Add the keys that tell PowerInfer a model's sizes and constants.

    Source: PowerInfer@d3ebd7c llama.cpp:llm_load_hparams. Each is written where the model has it:
    PowerInfer reads the norm's epsilon under one of two names by architecture (and none for OPT,
    whose graph computes with 0), and rotary keys only matter to graphs that turn queries and keys.
    """
    writer.add_name(name or architecture.name)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.d_model)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(model.d_ff)
    if model.rope_theta:
        writer.add_rope_dimension_count(model.head_dim)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.n_kv_heads)
    if architecture.centred:
        writer.add_layer_norm_eps(model.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(model.norm_eps)
    if model.rope_theta:
        writer.add_rope_freq_base(model.rope_theta)
    if model.rope_scaling is not None:
        _add_scaling(writer, model.rope_scaling)


def _add_scaling(writer: GGUFWriter, scaling: RopeScaling) -> None:
    writer.add_rope_scaling_type(_SCALING_TYPES[scaling.kind])
    writer.add_rope_scaling_factor(scaling.factor)
    writer.add_rope_scaling_finetuned(True)
    if scaling.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context)


def _add_types(writer: GGUFWriter, types: FileTypes) -> None:
    writer.add_file_type(int(types.file_type))
    if types.weights == "q4_0":
        writer.add_quantization_version(GGML_QUANT_VERSION)


@dataclass(frozen=True)
class _Streamed:
    """A tensor as the writer wants it, made and written piece by piece.

    It writes through the file object, which says why a write failed; numpy does not.
    """

    tensor: PlannedTensor

    @property
    def nbytes(self) -> int:
        return self.tensor.size

    def tofile(self, file: IO[bytes]) -> None:
        written = 0
        for piece in made_ahead(partial(_encode, self.tensor), _pieces(self.tensor.read())):
            written += file.write(piece.data)
        assert written == self.nbytes


def _write(writer: GGUFWriter, tensors: Sequence[PlannedTensor]) -> None:
    for tensor in tensors:
        # With a type of its own given, the writer takes no notice of numpy's.
        dtype = np.dtype(np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.size, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    with flushed_meanwhile(writer.fout[0].fileno()):
        for tensor in tqdm(tensors, unit="tensor", desc="export-gguf", disable=None):
            streamed: Any = _Streamed(tensor)
            writer.write_tensor_data(streamed)


def _pieces(numbers: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cut along the first dimension into views."""
    rows = max(1, _PIECE * len(numbers) // numbers.numel())
    return torch.split(numbers, rows)


def _encode(tensor: PlannedTensor, piece: torch.Tensor) -> npt.NDArray[np.generic]:
    if tensor.kind is GGMLQuantizationType.F32:
        return encode(piece.float().numpy(), tensor.kind)
    half = piece.half()
    if piece.dtype != torch.float16 and not torch.isfinite(torch.stack(half.aminmax())).all():
        largest = float(piece.float().abs().max())
        raise ExportError(
            f"tensor {tensor.name}: largest magnitude {largest:g} does not fit float16, the "
            "type PowerInfer computes in",
            "the checkpoint cannot be exported",
        )
    # A copy even where nothing changes: it takes the waiting for a mapped file off the writer.
    return encode(half.clone(memory_format=torch.contiguous_format).numpy(), tensor.kind)
