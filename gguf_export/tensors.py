"""The tensors of an exported file: which, in what order, shape and type, and how each is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from architectures.checkpoint import Checkpoint
from architectures.spec import ModelShape, TensorRule, Transform
from gguf_export.predictor_source import PredictorSource
from gguf_export.schema import DENSE_DOWN, DOWN, FC1, FC2


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written.

    Attributes:
        name: its name in the file.
        shape: numpy order.
        dtype: float32 for vectors, float16 for matrices: PowerInfer's CPU axpy reads the down
            matrix as F16 whatever the header says, and its 1-D kernels want F32.
        read: makes the data when its turn comes, so that one tensor is in memory at a time.
    """

    name: str
    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    read: Callable[[], npt.NDArray[np.generic]]


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


def transformed_shape(shape: tuple[int, ...], transform: Transform) -> tuple[int, ...]:
    """Return a tensor's shape in the file."""
    return shape[::-1] if transform == "transpose" else shape


def apply_transform(weight: torch.Tensor, transform: Transform, model: ModelShape) -> torch.Tensor:
    """Return a checkpoint tensor in the file's layout."""
    if transform == "permute_q":
        return permute_rope(weight, model.n_heads)
    if transform == "permute_k":
        return permute_rope(weight, model.n_kv_heads)
    return weight.T if transform == "transpose" else weight


def plan_model(checkpoint: Checkpoint, *, sparse: bool) -> Iterator[PlannedTensor]:
    """Yield the model's tensors as its family lists them.

    Args:
        checkpoint: the model.
        sparse: a dense file has the down matrix under another name and not transposed
            (PowerInfer@d3ebd7c llama.cpp:llm_load_tensors).
    """
    model = checkpoint.shape
    for rule in checkpoint.architecture.tensors:
        assert rule.target is not None
        if not sparse and rule.transform == "transpose":
            rule = replace(rule, target=rule.target.replace(DOWN, DENSE_DOWN), transform="none")
        assert rule.target is not None
        for layer in range(model.n_layers if rule.per_layer else 1):
            shape = transformed_shape(rule.shape(model), rule.transform)
            yield PlannedTensor(
                rule.target.format(layer=layer),
                shape,
                np.float32 if len(shape) == 1 else np.float16,
                partial(_read_model, checkpoint, rule, layer),
            )


def plan_predictors(
    predictors: PredictorSource, ranks: Sequence[int], model: ModelShape
) -> Iterator[PlannedTensor]:
    """Yield the predictors' tensors, given the rank of each layer."""
    for layer, rank in enumerate(ranks):
        for name, part, shape in (
            (FC1, "fc1", (rank, model.d_model)),
            (FC2, "fc2", (model.d_ff, rank)),
        ):
            read = partial(_read_predictor, predictors, layer, part)
            yield PlannedTensor(name.format(layer=layer), shape, np.float16, read)


def _read_model(checkpoint: Checkpoint, rule: TensorRule, layer: int) -> npt.NDArray[np.generic]:
    tensor = apply_transform(checkpoint.read(rule, layer), rule.transform, checkpoint.shape)
    if tensor.dim() == 1:
        tensor = tensor.float()
    elif tensor.dtype != torch.float16:
        half = tensor.half()
        # What does not fit goes on as it is, so that it is refused by its own value.
        fits = bool(torch.isfinite(torch.stack(torch.aminmax(half))).all())
        tensor = half if fits else tensor.float()
    array: npt.NDArray[np.generic] = tensor.contiguous().numpy()
    return array


def _read_predictor(predictors: PredictorSource, layer: int, part: str) -> npt.NDArray[np.generic]:
    array: npt.NDArray[np.generic] = getattr(predictors.layer(layer), part).numpy()
    return array
