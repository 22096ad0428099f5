"""The tensors of an exported file: which, in what order, shape and type, and how each is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from gguf import GGMLQuantizationType
from torch.nn.functional import pad

from architectures.checkpoint import Checkpoint
from architectures.spec import ModelShape, TensorRule
from gguf_export.predictor_source import PredictorSource
from gguf_export.pwri.element_types import FileTypes, data_size
from gguf_export.pwri.schema import DENSE_DOWN, DOWN, EMBEDDING, FC1, FC2, HEAD


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


def permute_rope(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows for ggml's RoPE, which rotates neighbouring pairs instead of halves.

    Row `h·D + c·D/2 + i` of Hugging Face's layout becomes row `h·D + 2i + c` (head h, half c, D the
    head size). Source: PowerInfer@d3ebd7c convert.py:permute.

    Args:
        weight: (heads · head size, columns).
        heads: heads in the rows.
    """
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def group_qkv(weight: torch.Tensor, model: ModelShape) -> torch.Tensor:
    """Reorder Falcon's fused rows: all queries, then all keys, then all values.

    In Hugging Face's layout every key/value head has its queries, its key and its value together.
    Source: PowerInfer@d3ebd7c convert-hf-to-powerinfer-gguf.py:FalconModel.write_tensors.

    Args:
        weight: ((n_heads + 2 · n_kv_heads) · head size, columns).
        model: gives the numbers of heads.
    """
    groups = weight.reshape(model.n_kv_heads, -1, model.head_dim, weight.shape[1])
    parts = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
    return torch.cat([part.reshape(-1, weight.shape[1]) for part in parts])


def plan_model(
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
        rank += -rank % types.rank_block
        for pattern, part, shape in (
            (FC1, "fc1", (rank, model.d_model)),
            (FC2, "fc2", (model.d_ff, rank)),
        ):
            name = pattern.format(layer=layer)
            read = partial(_read_predictor, predictors, layer, part, shape)
            yield PlannedTensor(name, shape, types.of(name, shape), read)


def _read_model(checkpoint: Checkpoint, rule: TensorRule, layer: int) -> torch.Tensor:
    """Return a checkpoint tensor in the file's layout."""
    weight, model = checkpoint.read(rule, layer), checkpoint.shape
    if rule.transform == "permute_q":
        return permute_rope(weight, model.n_heads)
    if rule.transform == "permute_k":
        return permute_rope(weight, model.n_kv_heads)
    if rule.transform == "group_qkv":
        return group_qkv(weight, model)
    return weight.T if rule.transform == "transpose" else weight


def _read_predictor(
    predictors: PredictorSource, layer: int, part: str, shape: tuple[int, ...]
) -> torch.Tensor:
    found: torch.Tensor = getattr(predictors.layer(layer), part)
    rows, columns = (want - have for want, have in zip(shape, found.shape, strict=True))
    return pad(found, (0, columns, 0, rows)) if rows or columns else found
