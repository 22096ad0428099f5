"""Writing of PWRI files, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter, LlamaFileType
from tqdm import tqdm

from architectures.spec import Architecture, ModelShape
from common.errors import ExportError
from gguf_export.schema import SPARSE_MAGIC
from gguf_export.tensors import PlannedTensor
from gguf_export.vocabulary import Vocabulary

_F16_MAX = float(np.finfo(np.float16).max)


def add_model_keys(
    writer: GGUFWriter, architecture: Architecture, model: ModelShape, name: str
) -> None:
    """Add the keys that PowerInfer reads for a LLaMA-like model (llm_load_hparams)."""
    writer.add_name(name or architecture.name)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.d_model)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(model.d_ff)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.n_kv_heads)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_file_type(int(LlamaFileType.MOSTLY_F16))


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Add the SentencePiece keys."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_bos_token_id(vocabulary.bos_id)
    if vocabulary.eos_id >= 0:
        writer.add_eos_token_id(vocabulary.eos_id)
    writer.add_unk_token_id(vocabulary.unk_id)


def write_file(
    path: Path,
    *,
    architecture: Architecture,
    model: ModelShape,
    name: str,
    vocabulary: Vocabulary,
    keys: Mapping[str, float | str],
    tensors: Sequence[PlannedTensor],
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
        sparse: which of the two.

    Raises:
        OSError: the system refused a write.
        ExportError: a weight does not fit float16.
    """
    writer = GGUFWriter(path, architecture.gguf_name)
    try:
        add_model_keys(writer, architecture, model, name)
        add_vocabulary(writer, vocabulary)
        for key, value in keys.items():
            add = writer.add_string if isinstance(value, str) else writer.add_float32
            add(key, value)
        _write(writer, tensors)
    finally:
        writer.close()
    if sparse:
        with path.open("r+b") as file:
            file.write(SPARSE_MAGIC)


class _Whole(np.ndarray[Any, Any]):
    """Writes itself through the file object, which says why a write failed; numpy does not."""

    def tofile(self, fid: Any, sep: str = "", format: str = "") -> None:
        fid.write(np.ascontiguousarray(self).data)


def _write(writer: GGUFWriter, tensors: Sequence[PlannedTensor]) -> None:
    for tensor in tensors:
        dtype = np.dtype(tensor.dtype)
        size = int(np.prod(tensor.shape)) * dtype.itemsize
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tqdm(tensors, unit="tensor", desc="export-gguf", disable=None):
        writer.write_tensor_data(_convert(tensor).view(_Whole))


def _convert(tensor: PlannedTensor) -> npt.NDArray[np.generic]:
    data = tensor.read()
    if np.dtype(tensor.dtype) == np.float16 and data.dtype != np.float16:
        largest = float(np.abs(data).max())
        if not largest <= _F16_MAX:
            raise ExportError(
                f"tensor {tensor.name}: largest magnitude {largest:g} does not fit float16, the "
                "type PowerInfer computes in; the checkpoint cannot be exported"
            )
    return data.astype(tensor.dtype, copy=False)
