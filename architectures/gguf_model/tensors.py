"""Tensors of a GGUF file by their Hugging Face names, in Hugging Face's layout.

One tensor is dequantised at a time, mapped from the file where its numbers need no change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from architectures.gguf_model.byte_level import splitting_notes
from architectures.gguf_model.keys import FETCH_FILE
from architectures.layouts import from_file
from architectures.spec import Architecture, ModelShape, Transform
from common.errors import CheckpointError
from gguf_files.elements import decode, readable
from gguf_files.names import DENSE_DOWN, DOWN, PROFILER, ROUTER, expert_name
from gguf_files.reader import GGUFFile, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_QUANTISED = torch.float16
"""What a quantised model is run and saved in; its numbers are read as float32, exactly."""

_NOT_THE_MODEL = re.compile(r"blk\.\d+\.(fc[12]\.weight|attn_rot_embd\..*)|rope_freqs\.weight")
"""Predictors, and what only repeats the keys; `config` looks at the frequencies."""

_OF_EXPERTS = 3
"""Dimensions of a tensor that holds a matrix of each expert."""

_ROUTER = re.compile(rf"blk\.\d+\.{ROUTER}\.weight")
"""What weighs experts, of which there is one here: whatever it says, the weight is 1."""


class GGUFTensors:
    """Lazy access to a file's tensors; see `architectures.source.Tensors`."""

    def __init__(
        self,
        file: GGUFFile,
        architecture: Architecture,
        shape: ModelShape,
        *,
        experts: bool = False,
    ) -> None:
        """Match the file's tensors with a family's rules.

        Args:
            file: the file.
            architecture: the family.
            shape: its sizes.
            experts: FFNs are stored as experts, see `gguf_files.names.SMALLTHINKER`.

        Raises:
            CheckpointError: a tensor that the family does not have, or of a type that cannot be
                read. What is missing is for the caller to tell.
        """
        self.file, self._architecture, self._shape = file, architecture, shape
        self.notes = splitting_notes(file)
        self._experts = experts
        self._stored = dict(_stored(file, architecture, shape, experts=experts))
        self._numbers_of_experts = _numbers_of_experts(architecture, shape)
        self.shards: dict[str, Path] = {
            name: file.holder(info.name) for name, (info, _) in self._stored.items()
        }
        used = {info.name for info, _ in self._stored.values()}
        for name, info in file.tensors.items():
            if name in used and not readable(info.kind):
                raise CheckpointError(
                    f"{file.path}: tensor {name} has type {info.kind.name}, which cannot be read",
                    "pass the model in another type, such as F16 or Q8_0",
                )
            passed_over = (
                _NOT_THE_MODEL.fullmatch(name)
                or (experts and _ROUTER.fullmatch(name))
                or (name == PROFILER and shape.experts is not None)
            )
            if name not in used and not passed_over:
                raise CheckpointError(
                    f"{file.path}: tensor {name} belongs to no {architecture.name} model",
                    "psp would leave it out and compute another model; pass another file",
                )

    def stored(self, name: str) -> tuple[TensorInfo, Transform]:
        """Return where a tensor lies, and how its layout there differs from Hugging Face's."""
        return self._stored[name]

    def where(self, name: str) -> str:
        """Return the file that holds a tensor and what it is called there, for messages."""
        return f"{self.shards[name]}: tensor {self._stored[name][0].name}"

    def missing(self, name: str, *, head: bool, bare: bool) -> tuple[str, str]:
        """Return problem and remedy for a tensor that is not there, by its name in such a file."""
        places = _places(self.file, self._architecture, self._shape, experts=self._experts)
        sparse, dense = next(names for source, _, *names in places if source == name)
        wanted = sparse if self.file.sparse else dense
        return f"{self.file.path}: tensor {wanted} is missing", FETCH_FILE

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return a tensor's shape, and its dtype: float16 for what is quantised."""
        info, transform = self._stored[name]
        shape = _matrix(info)
        shape = shape[::-1] if transform == "transpose" else shape
        return shape, _PLAIN.get(info.kind, _QUANTISED)

    def read(self, name: str, count: int | None = None) -> torch.Tensor:
        """Read a tensor, or its first `count` rows, in its own dtype or float32 if quantised.

        Raises:
            FormatError: the file cannot be read any more.
        """
        info, transform = self._stored[name]
        rows = count if transform == "none" else None
        columns = count if transform == "transpose" else None
        numbers = self._numbers(info, rows, columns, self._numbers_of_experts.get(name, 0))
        # Laid out as in a directory, so that sums come out the same to the last bit.
        return from_file(numbers, transform, self._shape)[:count].contiguous()

    def _numbers(
        self, info: TensorInfo, rows: int | None, columns: int | None, expert: int
    ) -> torch.Tensor:
        """Return a stored matrix's first rows and columns, in whole blocks; None for all."""
        block, block_bytes = GGML_QUANT_SIZES[info.kind]
        *outer, length = _matrix(info)
        blocks = length // block if columns is None else min(-(-columns // block), length // block)
        table: npt.NDArray[np.uint8] = self.file.mapped(info.name)
        if len(info.shape) == _OF_EXPERTS:
            table = table.reshape(info.shape[0], -1)[expert]
        if outer:
            table = table.reshape(*outer, -1)[:rows]
        table = table[..., : blocks * block_bytes]
        plain = _PLAIN.get(info.kind)
        if plain is not None:
            return torch.from_numpy(table).view(plain)
        shape = (*table.shape[:-1], blocks * block)
        numbers = decode(table.reshape(-1), shape, info.kind)
        return torch.from_numpy(numbers)


def _matrix(info: TensorInfo) -> tuple[int, ...]:
    """Return a tensor's shape without the dimension of experts."""
    return info.shape[1:] if len(info.shape) == _OF_EXPERTS else info.shape


def _numbers_of_experts(architecture: Architecture, shape: ModelShape) -> dict[str, int]:
    """Return the number of the expert to which a tensor belongs, by its Hugging Face name."""
    return {
        rule.source.format(layer=layer, expert=expert): expert
        for rule in architecture.tensors
        if rule.per_expert
        for layer, expert in rule.places(shape)
    }


def _turned(file: GGUFFile, name: str, shape: ModelShape) -> Transform:
    """Return how an expert's down matrix lies: PowerInfer's second engine wants it transposed.

    That engine goes by the shape too, and takes square ones for transposed; llama.cpp does not.

    Raises:
        CheckpointError: square ones, which may be either.
    """
    if shape.d_model == shape.d_ff:
        raise CheckpointError(
            f"{file.path}: experts have as many neurons as d_model, so nothing tells whether "
            f"{name} is transposed",
            "pass the model's Hugging Face directory",
        )
    info = file.tensors.get(name)
    turned = info is not None and info.shape[1:] == (shape.d_ff, shape.d_model)
    return "transpose" if turned else "none"


def _stored(
    file: GGUFFile, architecture: Architecture, shape: ModelShape, *, experts: bool
) -> Iterator[tuple[str, tuple[TensorInfo, Transform]]]:
    """Yield the Hugging Face name of each tensor that is there, its place and its layout."""
    for name, transform, sparse, dense in _places(file, architecture, shape, experts=experts):
        if sparse in file.tensors:
            yield name, (file.tensors[sparse], transform)
        elif dense in file.tensors:
            yield name, (file.tensors[dense], "none")


def _places(
    file: GGUFFile, architecture: Architecture, shape: ModelShape, *, experts: bool
) -> Iterator[tuple[str, Transform, str, str]]:
    """Yield each tensor's Hugging Face name, its transform, its names in sparse and dense files."""
    for rule, target in architecture.exported:
        for layer, expert in rule.places(shape):
            sparse = target.format(layer=layer)
            source = rule.source.format(layer=layer, expert=expert)
            if experts:
                name = expert_name(sparse)
                turned = rule.per_expert and rule.transform == "transpose"
                yield source, _turned(file, name, shape) if turned else "none", name, name
                continue
            dense = sparse.replace(f".{DOWN}.", f".{DENSE_DOWN}.")
            yield source, rule.transform, sparse, dense
