"""Writing of PWRI files, a few pieces of a tensor in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, RopeScalingType
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from common.errors import ExportError
from common.files import write_error
from common.overlap import flushed_meanwhile, made_ahead
from common.version import tool_version
from gguf_export.pwri.element_types import FileTypes, encode
from gguf_export.pwri.schema import ACTIVATION_KEY, FINGERPRINT_KEY, SPARSE_MAGIC, VERSION_KEY
from gguf_export.tensors import PlannedTensor
from gguf_export.tokens.vocabulary import Vocabulary, add_vocabulary

_PIECE = 1 << 20
"""Numbers that are converted at once."""


@dataclass(frozen=True)
class ModelWriter:
    """Writes the files of a model.

    Attributes:
        checkpoint: the model.
        vocabulary: its tokenizer.
        types: of the elements.
    """

    checkpoint: Checkpoint
    vocabulary: Vocabulary
    types: FileTypes

    def write(
        self,
        path: Path,
        target: Path,
        keys: Mapping[str, float | str],
        tensors: Sequence[PlannedTensor],
        *,
        sparse: bool,
    ) -> None:
        """Write a PWRI file, which PowerInfer runs sparsely, or a GGUF file, run densely.

        Args:
            path: where to write it, a temporary name.
            target: its final name, for messages.
            keys: further keys, written as float32 or string; where the file comes from follows.
            tensors: what to write, in order.
            sparse: which of the two.

        Raises:
            OutputError: the system refused a write.
            ExportError: a weight does not fit float16.
        """
        try:
            writer = GGUFWriter(path, self.checkpoint.architecture.gguf_name)
            with closing(writer):
                _add_model_keys(writer, self.checkpoint)
                add_vocabulary(writer, self.vocabulary)
                writer.add_file_type(int(self.types.file_type))
                if self.types.weights == "q4_0":
                    writer.add_quantization_version(GGML_QUANT_VERSION)
                for key, value in {**keys, **_provenance(self.checkpoint)}.items():
                    add = writer.add_string if isinstance(value, str) else writer.add_float32
                    add(key, value)
                _write_tensors(writer, tensors)
                if sparse:
                    writer.fout[0].seek(0)
                    writer.fout[0].write(SPARSE_MAGIC)
        except OSError as error:
            raise write_error(target, error) from error


def _add_model_keys(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    """Add the keys that tell PowerInfer a model's sizes and constants.

    Source: PowerInfer@d3ebd7c llama.cpp:llm_load_hparams. Each is written where the model has it:
    PowerInfer reads the norm's epsilon under one of two names by architecture (and none for OPT,
    whose graph computes with 0), and rotary keys only matter to graphs that turn queries and keys.
    """
    architecture, model = checkpoint.architecture, checkpoint.shape
    name = os.fsencode(checkpoint.path.resolve().name).decode("utf-8", "replace")
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
        scaling = model.rope_scaling
        writer.add_rope_scaling_type(RopeScalingType(scaling.kind))
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_finetuned(True)
        if scaling.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling.original_context)


def _provenance(checkpoint: Checkpoint) -> dict[str, str]:
    return {
        VERSION_KEY: tool_version(),
        FINGERPRINT_KEY: checkpoint.fingerprint,
        ACTIVATION_KEY: checkpoint.shape.activation,
    }


def _write_tensors(writer: GGUFWriter, tensors: Sequence[PlannedTensor]) -> None:
    """Write header and tensors, through the file object: it says why a write failed, numpy not."""
    for tensor in tensors:
        # With a type of its own given, the writer takes no notice of numpy's.
        dtype = np.dtype(np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.size, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    with flushed_meanwhile(file.fileno()):
        for tensor in tqdm(tensors, unit="tensor", desc="export-gguf", disable=None):
            numbers, begin = tensor.read(), file.tell()
            rows = max(1, _PIECE * len(numbers) // numbers.numel())
            for piece in made_ahead(partial(_encode, tensor), torch.split(numbers, rows)):
                file.write(piece.data)
            assert file.tell() - begin == tensor.size
            writer.write_padding(file, tensor.size)


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
