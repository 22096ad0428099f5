"""The vocabulary in which a model family is described.

A family is data: where its parts sit in the Hugging Face module tree, what they are called in the
checkpoint and in a GGUF file, and how each tensor changes on the way. The code that acts on it
lives elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from architectures.config_json import Config
from architectures.rope import RopeScaling

if TYPE_CHECKING:
    from torch import nn

Activation = Literal["relu", "fatrelu", "drelu"]
SUBSTITUTABLE = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "fatrelu")
"""Values of `hidden_act` in whose place ReLU may come."""

Transform = Literal["none", "permute_q", "permute_k", "group_qkv", "transpose"]


Gating = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The FFNs of a layer of which a router chooses some for each token.

    Attributes:
        count: experts of a layer.
        chosen: experts that a token gets.
        gating: what makes weights of the chosen experts' logits, which are then divided by their
            sum.
    """

    count: int
    chosen: int
    gating: Gating


@dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """How attention differs from layer to layer.

    Attributes:
        rotary: of each layer, whether queries and keys are turned by their position.
        windowed: of each layer, whether a token sees the last `window` tokens only, itself counted.
        window: tokens; 0 where no layer has a window.
    """

    rotary: tuple[bool, ...]
    windowed: tuple[bool, ...]
    window: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes and constants of one model, in the field's words.

    Attributes:
        d_model: hidden size.
        d_ff: FFN intermediate size, the number of neurons of a layer, or of one of its experts.
        n_layers: number of blocks.
        n_heads: attention heads.
        n_kv_heads: key/value heads (fewer than `n_heads` under grouped-query attention).
        head_dim: size of one head.
        vocab_size: rows of the embedding.
        context_length: longest sequence that the model was trained for, tokens.
        norm_eps: epsilon of the normalisation layers.
        rope_theta: base of the rotary frequencies; 0 where positions are learned.
        tied_embeddings: the output head is the embedding matrix.
        activation: `relu`, `fatrelu` or `drelu`.
        activation_threshold: FATReLU passes values from this on; 0 for the others.
        embedding_scale: factor folded into the embedding.
        residual_scale: factor folded into what each half of a block adds to the residual stream.
        output_scale: factor folded into the output head.
        rope_scaling: what scales rotary positions, None for most models.
        experts: of a mixture of experts, None for most models.
        attention: where layers attend differently, None for most models.
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
    activation: Activation = "relu"
    activation_threshold: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    output_scale: float = 1.0
    rope_scaling: RopeScaling | None = None
    experts: Experts | None = None
    attention: LayerAttention | None = None

    def facts(self) -> dict[str, Any]:
        """Return all of it, ready for JSON; what most models lack only where it is there.

        Fingerprints made before there were scalings so remain valid.
        """
        facts = asdict(self)
        for key in ("rope_scaling", "experts", "attention"):
            if facts[key] is None:
                del facts[key]
        return facts


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """One tensor: its name on both sides and what happens to it in between.

    Attributes:
        source: name in the checkpoint and in the runnable model; `{layer}` stands for the block's
            number, `{expert}` for the expert's.
        target: name in the GGUF file, `{layer}` likewise; None where PowerInfer has no such tensor
            and takes the one of `tied_to` instead. A layer's experts share one tensor there.
        dims: names of the `ModelShape` sizes, in the checkpoint's order. `q_rows` and `kv_rows`
            stand for heads times head size, `qkv_rows` for both together, `positions` for the rows
            of a table of learned positions, `n_experts` for the experts of a layer.
        transform: change of layout between the two.
        tied_to: tensor that stands in where embeddings are tied.
        scale: name of the `ModelShape` factor that is folded into the tensor.
    """

    source: str
    dims: tuple[str, ...]
    target: str | None = None
    transform: Transform = "none"
    tied_to: str | None = None
    scale: str | None = None

    @property
    def per_layer(self) -> bool:
        """Whether the rule stands for one tensor in every block."""
        return "{layer}" in self.source

    @property
    def per_expert(self) -> bool:
        """Whether the rule stands for one tensor in every expert of every block."""
        return "{expert}" in self.source

    def places(self, model: ModelShape) -> Iterator[tuple[int, int]]:
        """Yield layer and expert of every tensor that the rule stands for; 0 where it has none."""
        experts = model.experts.count if self.per_expert and model.experts is not None else 1
        for layer in range(model.n_layers if self.per_layer else 1):
            for expert in range(experts):
                yield layer, expert

    def shape(self, model: ModelShape) -> tuple[int, ...]:
        """Return the tensor's shape in the checkpoint."""
        q_rows, kv_rows = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
        rows = {
            "q_rows": q_rows,
            "kv_rows": kv_rows,
            "qkv_rows": q_rows + 2 * kv_rows,
            "positions": model.context_length + POSITION_OFFSET,
            "n_experts": 0 if model.experts is None else model.experts.count,
        }
        return tuple(rows[dim] if dim in rows else int(getattr(model, dim)) for dim in self.dims)

    def factor(self, model: ModelShape) -> float:
        """Return the factor to fold into the tensor."""
        return 1.0 if self.scale is None else float(getattr(model, self.scale))


def weight(
    source: str,
    target: str | None,
    *dims: str,
    transform: Transform = "none",
    tied_to: str | None = None,
    scale: str | None = None,
) -> TensorRule:
    """Return the rule of a module's weight, given the module's names on both sides."""
    return TensorRule(
        source=f"{source}.weight",
        target=None if target is None else f"{target}.weight",
        dims=dims,
        transform=transform,
        tied_to=None if tied_to is None else f"{tied_to}.weight",
        scale=scale,
    )


def with_bias(
    source: str, target: str, *dims: str, transform: Transform = "none"
) -> tuple[TensorRule, TensorRule]:
    """Return the rules of a module's weight and of its bias."""
    bias = TensorRule(source=f"{source}.bias", target=f"{target}.bias", dims=dims[:1])
    return weight(source, target, *dims, transform=transform), bias


def in_blocks(layers: str, *rules: TensorRule) -> tuple[TensorRule, ...]:
    """Return rules for every block of the list at `layers`, given names within a block."""
    return tuple(
        replace(
            rule, source=f"{layers}.{{layer}}.{rule.source}", target=f"blk.{{layer}}.{rule.target}"
        )
        for rule in rules
    )


POSITION_OFFSET = 2
"""Rows before the first position in OPT's table of learned positions (transformers
`models/opt/modeling_opt.py:OPTLearnedPositionalEmbedding`)."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model family.

    Attributes:
        name: the family's name in messages and metadata.
        hf_classes: values of `architectures` in config.json that belong to the family.
        claims: tells, of a config with such a class, whether it belongs to this family.
        gguf_name: `general.architecture` of the exported file.
        context_length: the only context for which PowerInfer has a graph; None where any will do.
        dense_note: what a user must know of a dense file (`--dense`), as PowerInfer runs it; None
            where it cannot.
        embeddings: paths in the runnable model of what makes the first block's input: the tokens'
            embedding, and tables that are added to it.
        layers: path of the block list in the runnable model.
        output_norm: path of the norm behind the last block.
        predictor_input: path in a block of the module whose input is the predictor's input.
        activation_taps: paths in a block of the modules whose outputs must all pass the activation
            for a neuron to be active; `{expert}` stands for the expert's number.
        ffn_output: path in a block of the module whose input is the FFN's sparse intermediate;
            `{expert}` likewise.
        gate: tensor of a block that decides activity, (d_ff, d_model); of one of its experts.
        ffn_norm: tensor of a block, the weight of the norm between predictor's input and `gate`.
        ffn_down: tensor of a block, the down projection, (d_model, d_ff).
        centred: that norm subtracts the mean (LayerNorm) instead of only scaling (RMSNorm).
        ffn_matrices: matrices of an FFN, 3 if gated, else 2.
        tensors: all tensors of the checkpoint, in the order of the exported file.
        read_shape: turns config.json into a `ModelShape`, or raises `CheckpointError`.
        make_model: builds the untrained model, whose parameters are named as `tensors`.
    """

    name: str
    hf_classes: tuple[str, ...]
    claims: Callable[[Config], bool] = lambda config: True
    gguf_name: str
    context_length: int | None = None
    dense_note: str | None
    embeddings: tuple[str, ...]
    layers: str
    output_norm: str
    predictor_input: str
    activation_taps: tuple[str, ...]
    ffn_output: str
    gate: str
    ffn_norm: str
    ffn_down: str
    centred: bool
    ffn_matrices: int
    tensors: tuple[TensorRule, ...]
    read_shape: Callable[[Config], ModelShape]
    make_model: Callable[[ModelShape, Config], nn.Module]

    @property
    def exported(self) -> Iterator[tuple[TensorRule, str]]:
        """The rules of the tensors that a file holds, with their names in it, in order."""
        for rule in self.tensors:
            if rule.target is not None:
                yield rule, rule.target

    def rule(self, name: str) -> TensorRule:
        """Return the rule of a tensor of a block, such as `mlp.gate_proj.weight`."""
        source = f"{self.layers}.{{layer}}.{name}"
        return next(rule for rule in self.tensors if rule.source == source)
