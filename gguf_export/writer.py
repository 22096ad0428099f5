"""Writing model files, a few pieces of a tensor in memory at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from common.errors import ExportError
from common.files import write_error
from common.hashing import HashedFile, HashedWriter
from common.overlap import flushed_meanwhile, made_ahead
from gguf_export.model_keys import add_keys, provenance
from gguf_export.plan import PlannedTensor, plan_model
from gguf_export.pwri.element_types import WIDE, FileTypes, encode
from gguf_export.pwri.schema import parse_name
from gguf_export.tokens.splitting import splitting_keys
from gguf_export.tokens.vocabulary import LLAMA_CPP, POWERINFER, SECOND_ENGINE, Vocabulary
from gguf_files.elements import PLAIN
from gguf_files.reader import SPARSE_MAGIC

_PIECE = 1 << 20
"""Numbers that are converted at once."""

_TOO_LARGE = {
    POWERINFER: ("the type PowerInfer computes in", "the checkpoint cannot be exported"),
    SECOND_ENGINE: ("the type of Q4_0's steps", "the checkpoint cannot be exported"),
    LLAMA_CPP: ("the type asked for or that of Q4_0's steps", "choose --outtype bf16 or q8_0"),
}
"""Why a number must fit float16, and what to do where it does not, by engine."""

_UP = re.compile(r"\.ffn_up(_exps)?\.")


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
    ) -> HashedFile:
        """Write a PWRI file, which PowerInfer runs sparsely, or a GGUF file, run densely.

        Args:
            path: where to write it, a temporary name.
            target: its final name, for messages.
            keys: further keys, see `ModelFile.write`.
            predictors: tensors that follow the model's, see `plan.plan_predictors`.
            sparse: which of the two.

        Returns:
            What was written, by the target's name.

        Raises:
            PspError: see `ModelFile.write`.
        """
        model = list(plan_model(self.checkpoint, sparse=sparse, types=self.types))
        name = self.checkpoint.architecture.gguf_name
        file = ModelFile(self.checkpoint, self.vocabulary, name)
        return file.write(path, target, keys, [*model, *predictors], sparse=sparse)


@dataclass(frozen=True)
class ModelFile:
    """A model's file of any architecture.

    Attributes:
        checkpoint: the model.
        vocabulary: its tokenizer.
        architecture: `general.architecture`.
        sizes: further keys of the architecture's sizes, named without it, written as uint32.
    """

    checkpoint: Checkpoint
    vocabulary: Vocabulary
    architecture: str
    sizes: Mapping[str, int] = field(default_factory=dict)

    def write(
        self,
        path: Path,
        target: Path,
        keys: Mapping[str, float | str],
        tensors: Sequence[PlannedTensor],
        *,
        sparse: bool = False,
    ) -> HashedFile:
        """Write it.

        Args:
            path: where to write it, a temporary name.
            target: its final name, for messages.
            keys: further keys, written as bool, float32 or string; how texts are split and where
                the file comes from follow.
            tensors: all of it, in order.
            sparse: whether PowerInfer runs it sparsely.

        Returns:
            What was written, by the target's name.

        Raises:
            OutputError: the system refused a write.
            CheckpointError: a weight is NaN or infinite, told where it is met.
            ExportError: a weight does not fit float16.
        """
        try:
            writer = GGUFWriter(path, self.architecture)
            with closing(writer):
                add_keys(writer, self.checkpoint, self.vocabulary)
                for name, size in self.sizes.items():
                    key = f"{self.architecture}.{name}"
                    writer.kv_data[0].pop(key, None)  # a GGUF model's own
                    writer.add_uint32(key, size)
                model = [each for each in tensors if parse_name(each.name).role != "predictor"]
                _add_types(writer, model)
                for key, value in {**keys, **self._told()}.items():
                    _add_key(writer, key, value)
                for each in tensors:
                    # With a type of its own given, the writer takes no notice of numpy's.
                    dtype = np.dtype(np.float32)
                    writer.add_tensor_info(each.name, each.shape, dtype, each.size, each.kind)
                file = _begun(writer, path, sparse=sparse)
                _write_tensors(writer, file, tensors, self.vocabulary.engine)
                return file.hashed(target.name)
        except OSError as error:
            raise write_error(target, error) from error
        except ExportError:
            self.checkpoint.check_numbers()  # the cause, if it is there
            raise

    def _told(self) -> dict[str, float | str]:
        """Return what a file says of its tokenizer and its origin."""
        return splitting_keys(self.checkpoint, self.vocabulary) | provenance(self.checkpoint)


def _add_key(writer: GGUFWriter, key: str, value: float | str) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_float32(key, value)


def _add_types(writer: GGUFWriter, tensors: Sequence[PlannedTensor]) -> None:
    """Say the type of most of the FFN, which is copied with everything else where nothing changes.

    PowerInfer only prints it.
    """
    keys = writer.kv_data[0]
    kinds = [tensor.kind.name for tensor in tensors if _UP.search(tensor.name)]
    name = f"MOSTLY_{kinds[0]}"
    changed = "general.file_type" not in keys or any(tensor.stored is None for tensor in tensors)
    if changed and name in LlamaFileType.__members__:  # Q4_K alone is none: Q4_K_S, Q4_K_M
        keys.pop("general.file_type", None)
        writer.add_file_type(int(LlamaFileType[name]))
    quantised = any(tensor.kind not in PLAIN for tensor in tensors)
    if quantised and "general.quantization_version" not in keys:
        writer.add_quantization_version(GGML_QUANT_VERSION)


def _begun(writer: GGUFWriter, path: Path, *, sparse: bool) -> HashedWriter:
    """Write everything before the tensors' data; return the file."""
    writer.write_header_to_file()
    [header] = writer.fout
    if sparse:
        header.seek(0)
        header.write(SPARSE_MAGIC)
        header.seek(0, os.SEEK_END)
        header.flush()
    file = HashedWriter(header.detach(), path.read_bytes())
    writer.fout = [file]
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(file, file.tell())
    return file


def _write_tensors(
    writer: GGUFWriter, file: HashedWriter, tensors: Sequence[PlannedTensor], engine: str
) -> None:
    """Write the data, through the file object: it says why a write failed, numpy not."""
    with flushed_meanwhile(file.fileno()):
        for tensor in tqdm(tensors, unit="tensor", desc="export-gguf", disable=None):
            begin = file.tell()
            for piece in _pieces(tensor, engine):
                file.write(piece.data)
            assert file.tell() - begin == tensor.size
            writer.write_padding(file, tensor.size)


def _pieces(tensor: PlannedTensor, engine: str) -> Iterator[npt.NDArray[np.generic]]:
    """Yield a tensor's data: copied where it is stored as it will be, else converted."""
    if tensor.stored is not None:
        data = tensor.stored()
        yield from (data[at : at + _PIECE] for at in range(0, len(data), _PIECE))
        return
    numbers = tensor.read()
    rows = max(1, _PIECE * len(numbers) // numbers.numel())
    yield from made_ahead(partial(_encode, tensor, engine), torch.split(numbers, rows))


def _encode(tensor: PlannedTensor, engine: str, piece: torch.Tensor) -> npt.NDArray[np.generic]:
    if tensor.kind in WIDE:
        return encode(piece.float().numpy(), tensor.kind)
    half = piece.half()
    if piece.dtype != torch.float16 and not torch.isfinite(torch.stack(half.aminmax())).all():
        largest, (why, remedy) = float(piece.float().abs().max()), _TOO_LARGE[engine]
        problem = f"tensor {tensor.name}: largest magnitude {largest:g} does not fit float16"
        raise ExportError(f"{problem}, {why}", remedy)
    # A copy even where nothing changes: it takes the waiting for a mapped file off the writer.
    return encode(half.clone(memory_format=torch.contiguous_format).numpy(), tensor.kind)
