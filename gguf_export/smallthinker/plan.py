"""Which tensors such a file holds, in which types, and how each comes from where it is now."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType
from torch.nn.functional import pad

from architectures.checkpoint import Checkpoint
from architectures.gguf_model.tensors import GGUFTensors
from architectures.layouts import from_file
from architectures.spec import ModelShape, TensorRule, Transform
from gguf_export.plan import PlannedTensor
from gguf_export.smallthinker.types import ExpertTypes
from gguf_files.names import DENSE_DOWN, ROUTER, expert_name
from gguf_files.reader import GGUFFile, TensorInfo

_ROWS_ONLY = ("none", "permute_q", "permute_k")
"""Layouts that differ in the order of whole rows, which blocks do not reach across."""


def plan_expert(
    checkpoint: Checkpoint,
    types: ExpertTypes,
    *,
    transposed: bool = False,
    neurons: int | None = None,
) -> Iterator[PlannedTensor]:
    """Yield the tensors of a ReLU-gated LLaMA whose FFNs are one expert each, layer by layer.

    Rows of queries and keys keep Hugging Face's order. A head that is the embedding is written
    again, because factors may be folded into either.

    Args:
        checkpoint: a model of `requirements.check_one_expert`.
        types: of its elements.
        transposed: the down matrix is stored (1, d_ff, d_model), as PowerInfer's second engine
            needs it; else (1, d_model, d_ff), llama.cpp's.
        neurons: stored in the place of d_ff, which is less; the rest are zeros, and so never
            active. None stores the model's own.
    """
    model = checkpoint.shape
    added = 0 if neurons is None else neurons - model.d_ff
    for rule, target in checkpoint.architecture.exported:
        expert = expert_name(target) != target
        turned = transposed and f".{DENSE_DOWN}_exps." in expert_name(target)
        for layer in range(model.n_layers if rule.per_layer else 1):
            name, shape = expert_name(target).format(layer=layer), rule.shape(model)
            if expert:
                more = [added * (dim == "d_ff") for dim in rule.dims]
                shape = tuple(size + extra for size, extra in zip(shape, more, strict=True))
            shape = shape[::-1] if turned else shape
            shape = (1, *shape) if expert else shape
            read = partial(_read, checkpoint, rule, layer, turned, shape)
            made = PlannedTensor(name, shape, types.of(name, shape), read)
            whole = not (expert and added)
            yield _copied(made, checkpoint, rule, layer, types, turned) if whole else made
            if name.endswith(".ffn_norm.weight"):
                yield _router(layer, model)


def _read(
    checkpoint: Checkpoint, rule: TensorRule, layer: int, turned: bool, shape: tuple[int, ...]
) -> torch.Tensor:
    """Return a checkpoint's matrix, without the dimension of experts, zeros where it has less."""
    weight = checkpoint.read(rule, layer)
    weight = weight.T if turned else weight
    if weight.dim() == 1:
        return weight
    rows, columns = (want - have for want, have in zip(shape[-2:], weight.shape, strict=True))
    return pad(weight, (0, columns, 0, rows)) if rows or columns else weight


def _router(layer: int, model: ModelShape) -> PlannedTensor:
    """Return zeros: over one expert any logit gives the weight 1."""
    shape = (1, model.d_model)
    zeros = partial(torch.zeros, *shape)
    return PlannedTensor(f"blk.{layer}.{ROUTER}.weight", shape, GGMLQuantizationType.F32, zeros)


def _copied(
    tensor: PlannedTensor,
    checkpoint: Checkpoint,
    rule: TensorRule,
    layer: int,
    types: ExpertTypes,
    turned: bool,
) -> PlannedTensor:
    """Return a tensor as a GGUF model stores it, if nothing but the order of its rows changes."""
    files = checkpoint.files
    if not isinstance(files, GGUFTensors):
        return tensor
    info, transform = files.stored(checkpoint.source(rule, layer))
    rows = transform == "transpose" if turned else transform in _ROWS_ONLY
    wanted = info.kind if types.keeps(info.kind) and len(info.shape) > 1 else tensor.kind
    if rows and wanted is info.kind and rule.factor(checkpoint.shape) == 1:
        stored = partial(_stored, files.file, info, "none" if turned else transform, checkpoint)
        return PlannedTensor(tensor.name, tensor.shape, wanted, tensor.read, stored=stored)
    return PlannedTensor(tensor.name, tensor.shape, tensor.kind, tensor.read, before=info.kind)


def _stored(
    file: GGUFFile, info: TensorInfo, transform: Transform, checkpoint: Checkpoint
) -> npt.NDArray[np.uint8]:
    """Return a stored tensor's bytes, its rows in Hugging Face's order, (size,) uint8."""
    data = file.mapped(info.name)
    if transform == "none":
        return data
    rows = torch.from_numpy(data).view(info.shape[-2], -1)
    return from_file(rows, transform, checkpoint.shape).reshape(-1).numpy()
