"""The vocabulary in which a model family is described.

A family is data: where its parts sit in the Hugging Face module tree, what they are called in the
checkpoint and in a GGUF file, and how each tensor changes on the way. The code that acts on it
lives elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Transform = Literal["none", "permute_q", "permute_k", "transpose"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes and constants of one model, in the field's words.

    Attributes:
        d_model: hidden size.
        d_ff: FFN intermediate size, the number of neurons of a layer.
        n_layers: number of blocks.
        n_heads: attention heads.
        n_kv_heads: key/value heads (fewer than `n_heads` under grouped-query attention).
        head_dim: size of one head.
        vocab_size: rows of the embedding.
        context_length: longest sequence that the model was trained for, tokens.
        norm_eps: epsilon of the normalisation layers.
        rope_theta: base of the rotary frequencies.
        tied_embeddings: the output head is the embedding matrix.
    """

    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope_theta: float
    tied_embeddings: bool


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """One tensor: its name on both sides and what happens to it in between.

    Attributes:
        source: name in the checkpoint; `{layer}` stands for the block's number.
        target: name in the GGUF file; `{layer}` likewise.
        dims: names of the `ModelShape` sizes, in the checkpoint's order. `q_rows` and `kv_rows`
            stand for heads times head size.
        transform: change of layout between the two.
        tied_to: tensor that stands in where embeddings are tied and `source` is absent.
    """

    source: str
    target: str
    dims: tuple[str, ...]
    transform: Transform = "none"
    tied_to: str | None = None

    @property
    def per_layer(self) -> bool:
        """Whether the rule stands for one tensor in every block."""
        return "{layer}" in self.source

    def shape(self, model: ModelShape) -> tuple[int, ...]:
        """Return the tensor's shape in the checkpoint."""
        rows = {
            "q_rows": model.n_heads * model.head_dim,
            "kv_rows": model.n_kv_heads * model.head_dim,
        }
        return tuple(rows[dim] if dim in rows else int(getattr(model, dim)) for dim in self.dims)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model family.

    Attributes:
        name: the family's name in messages and metadata.
        hf_classes: values of `architectures` in config.json that belong to the family.
        gguf_name: `general.architecture` of the exported file.
        activation: the activation PowerInfer computes for this family.
        model_class: name of the class in `transformers` that runs the checkpoint.
        layers: path of the block list in that model.
        predictor_input: path in a block of the module whose input is the predictor's input.
        activation_taps: paths in a block of the modules whose outputs must all be positive for a
            neuron to be active.
        ffn_output: path in a block of the module whose input is the FFN's sparse intermediate.
        gate: rule of the matrix that decides activity.
        ffn_norm: rule of the norm between the predictor's input and `gate`.
        ffn_down: rule of the down projection.
        tensors: all tensors of the checkpoint, in the order of the file.
        read_shape: turns config.json into a `ModelShape`, or raises `CheckpointError`.
    """

    name: str
    hf_classes: tuple[str, ...]
    gguf_name: str
    activation: str
    model_class: str
    layers: str
    predictor_input: str
    activation_taps: tuple[str, ...]
    ffn_output: str
    gate: str
    ffn_norm: str
    ffn_down: str
    tensors: tuple[TensorRule, ...]
    read_shape: Callable[[Mapping[str, Any]], ModelShape]
