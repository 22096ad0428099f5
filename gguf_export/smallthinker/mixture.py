"""A mixture of experts as a file: tensors, keys, and what the programs have no graph for.

Tensors and keys are those of PowerInfer@d3ebd7c smallthinker/convert_hf_to_gguf.py and llama.cpp's
conversion/smallthinker.py, to the byte, with one key more than the first writes: how chosen
experts are weighed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from gguf import ExpertGatingFuncType

from architectures.checkpoint import Checkpoint
from architectures.gguf_model.mixture import STEP, WINDOW, program_layouts
from architectures.spec import Experts, LayerAttention, TensorRule
from common.errors import ExportError

_GATINGS = {"softmax": ExpertGatingFuncType.SOFTMAX, "sigmoid": ExpertGatingFuncType.SIGMOID}


@dataclass(frozen=True)
class MixtureTensor:
    """A tensor of such a file.

    Attributes:
        name: its name in the file.
        shape: numpy order.
        read: returns its numbers, (rows, columns) or a vector; the rows of experts follow one
            another.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def mixture_tensors(
    checkpoint: Checkpoint, *, transposed: bool, own_head: bool = False
) -> Iterator[MixtureTensor]:
    """Yield the tensors of a mixture of experts, a layer's experts together in one.

    Args:
        checkpoint: a mixture of experts.
        transposed: the down matrices are stored (experts, d_ff, d_model), as PowerInfer's second
            engine needs them; else (experts, d_model, d_ff), llama.cpp's.
        own_head: there is a head also where it is the embedding.
    """
    model = checkpoint.shape
    for rule, target in checkpoint.architecture.exported:
        if rule.tied_to is not None and model.tied_embeddings and not own_head:
            continue
        turned = transposed and rule.transform == "transpose"
        for layer in range(model.n_layers if rule.per_layer else 1):
            name, shape = target.format(layer=layer), rule.shape(model)
            shape = shape[::-1] if turned else shape
            if rule.per_expert:
                shape = (_experts(checkpoint).count, *shape)
            read = partial(_read, checkpoint, rule, layer, turned)
            yield MixtureTensor(name, shape, read)


def _read(checkpoint: Checkpoint, rule: TensorRule, layer: int, turned: bool) -> torch.Tensor:
    """Return a tensor, (rows, columns) or a vector; the experts' rows follow one another."""
    if not rule.per_expert:
        return checkpoint.read(rule, layer)
    parts = (checkpoint.read(rule, layer, expert) for expert in range(_experts(checkpoint).count))
    return torch.cat([part.T if turned else part for part in parts])


def _experts(checkpoint: Checkpoint) -> Experts:
    assert checkpoint.shape.experts is not None
    return checkpoint.shape.experts


def mixture_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the keys of a mixture's sizes, besides those that every model has."""
    experts, attention, model = _experts(checkpoint), _attention(checkpoint), checkpoint.shape
    window = {"attention.sliding_window": attention.window} if any(attention.windowed) else {}
    return {
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "expert_count": experts.count,
        "expert_used_count": experts.chosen,
        "expert_feed_forward_length": model.d_ff,
        "expert_gating_func": int(_GATINGS[experts.gating]),
        **window,
    }


def _attention(checkpoint: Checkpoint) -> LayerAttention:
    assert checkpoint.shape.attention is not None
    return checkpoint.shape.attention


def check_mixture(checkpoint: Checkpoint) -> None:
    """Refuse a sound model that the programs would compute otherwise.

    Source: as `architectures.gguf_model.mixture`.

    Raises:
        ExportError: naming the layers.
    """
    attention, model = _attention(checkpoint), checkpoint.shape
    has_window = any(attention.windowed)
    rotary, windowed = program_layouts(model.n_layers, window=has_window)
    for key, found, computed in (
        ("rope_layout", attention.rotary, rotary),
        ("sliding_window_layout", attention.windowed, windowed),
    ):
        layers = [n for n in range(model.n_layers) if found[n] != bool(computed[n])]
        if layers:
            raise ExportError(
                f"{checkpoint.path}: {key} is {int(found[layers[0]])} in layer {layers[0]}, for "
                f"which llama.cpp and PowerInfer's second engine compute {computed[layers[0]]}",
                "they know two layouts: rotary positions and no window everywhere, or neither in "
                f"each {STEP}th layer from the first on, both in the others, not of {STEP} layers",
            )
    within = model.context_length <= min(attention.window, WINDOW)
    if has_window and attention.window != WINDOW and not within:
        raise ExportError(
            f"{checkpoint.path}: sliding_window_size is {attention.window}, and llama.cpp and "
            f"PowerInfer's second engine take {WINDOW} whatever a file says",
            f"only a window of {WINDOW} can be exported, or a context that no window limits",
        )
