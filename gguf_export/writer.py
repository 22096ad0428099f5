"""Model files: their tensors, how each is made, and writing, a few pieces in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, RopeScalingType
from torch.nn.functional import pad
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from architectures.layouts import to_file
from architectures.spec import ModelShape, TensorRule
from common.element_types import ELEMENT_TYPES
from common.errors import ExportError
from common.files import write_error
from common.overlap import flushed_meanwhile, made_ahead
from common.version import tool_version
from gguf_export.predictor_source import PredictorSource
from gguf_export.pwri.element_types import FileTypes, encode
from gguf_export.pwri.schema import EMBEDDING, FC1, FC2, HEAD
from gguf_export.tokens.vocabulary import Vocabulary, add_vocabulary
from gguf_files.elements import data_size
from gguf_files.names import (
    ACTIVATION_KEY,
    ACTIVATION_THRESHOLD_KEY,
    DENSE_DOWN,
    DOWN,
    FINGERPRINT_KEY,
    VERSION_KEY,
)
from gguf_files.reader import SPARSE_MAGIC

_PIECE = 1 << 20
"""Numbers that are converted at once."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written.

    Attributes:
        name: its name in the file.
        shape: numpy order.
        kind: element type.
        read: returns the numbers when their turn comes, mapped from the checkpoint where nothing
            but their order changes.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """Bytes of its data in the file."""
        return data_size(self.shape, self.kind)


def _plan_model(
    checkpoint: Checkpoint, *, sparse: bool, types: FileTypes
) -> Iterator[PlannedTensor]:
    """Yield the model's tensors as its family lists them.

    Args:
        checkpoint: the model.
        sparse: a dense file has the down matrix under another name and not transposed
            (PowerInfer@d3ebd7c llama.cpp:llm_load_tensors).
        types: of its elements.
    """
    model, rules = checkpoint.shape, list(checkpoint.architecture.exported)
    head = HEAD if any(target == HEAD for _, target in rules) else EMBEDDING
    for rule, target in rules:
        if not sparse:
            target = target.replace(f".{DOWN}.", f".{DENSE_DOWN}.")
            transform = "none" if rule.transform == "transpose" else rule.transform
            rule = replace(rule, transform=transform)
        for layer in range(model.n_layers if rule.per_layer else 1):
            shape = rule.shape(model)
            shape = shape[::-1] if rule.transform == "transpose" else shape
            name = target.format(layer=layer)
            read = partial(_read_model, checkpoint, rule, layer)
            yield PlannedTensor(name, shape, types.of(name, shape, head), read)


def plan_predictors(
    predictors: PredictorSource, ranks: Sequence[int], model: ModelShape, types: FileTypes
) -> Iterator[PlannedTensor]:
    """Yield the predictors' tensors, given the rank of each layer.

    A rank that the type does not allow is padded: a hidden unit without weights is always 0.
    """
    for layer, rank in enumerate(ranks):
        rank = ELEMENT_TYPES[types.predictors].padded(rank)
        for pattern, part, shape in (
            (FC1, "fc1", (rank, model.d_model)),
            (FC2, "fc2", (model.d_ff, rank)),
        ):
            name = pattern.format(layer=layer)
            read = partial(_read_predictor, predictors, layer, part, shape)
            yield PlannedTensor(name, shape, types.of(name, shape), read)


def _read_model(checkpoint: Checkpoint, rule: TensorRule, layer: int) -> torch.Tensor:
    """Return a checkpoint tensor in the file's layout."""
    return to_file(checkpoint.read(rule, layer), rule.transform, checkpoint.shape)


def _read_predictor(
    predictors: PredictorSource, layer: int, part: str, shape: tuple[int, ...]
) -> torch.Tensor:
    found: torch.Tensor = getattr(predictors.layer(layer), part)
    rows, columns = (want - have for want, have in zip(shape, found.shape, strict=True))
    return pad(found, (0, columns, 0, rows)) if rows or columns else found


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
        predictors: Iterable[PlannedTensor] = (),
        *,
        sparse: bool,
    ) -> None:
        """Write a PWRI file, which PowerInfer runs sparsely, or a GGUF file, run densely.

        Args:
            path: where to write it, a temporary name.
            target: its final name, for messages.
            keys: further keys, written as float32 or string; where the file comes from follows.
            predictors: tensors that follow the model's, see `plan_predictors`.
            sparse: which of the two.

        Raises:
            OutputError: the system refused a write.
            ExportError: a weight does not fit float16.
        """
        tensors = [*_plan_model(self.checkpoint, sparse=sparse, types=self.types), *predictors]
        try:
            writer = GGUFWriter(path, self.checkpoint.architecture.gguf_name)
            with closing(writer):
                _add_model_keys(writer, self.checkpoint)
                add_vocabulary(writer, self.vocabulary)
                writer.add_file_type(int(self.types.file_type))
                if self.types.weights != "f16":
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


def _provenance(checkpoint: Checkpoint) -> dict[str, float | str]:
    return {
        VERSION_KEY: tool_version(),
        FINGERPRINT_KEY: checkpoint.fingerprint,
        ACTIVATION_KEY: checkpoint.shape.activation,
        ACTIVATION_THRESHOLD_KEY: checkpoint.shape.activation_threshold,
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
