"""The LLaMA-like families: RMSNorm, rotary positions, a gated FFN, no biases.

Layout and names: transformers `models/llama/modeling_llama.py`. Tap and transforms:
PowerInfer@d3ebd7c `llama.cpp:build_llama_variants` (the predictor reads `ffn_inp`, the residual
before the FFN norm).

Another family of this graph is one more entry of `GATED`: `LLAMA`, and what differs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from architectures.config_json import MEND, Config, flag, number, real, refuse
from architectures.rope import read_rope, rope_parameters
from architectures.spec import Activation, Architecture, ModelShape, in_blocks, weight

_MISTRAL_WINDOW = 4096
"""Mistral's sliding window where the config has no such key (transformers MistralConfig)."""


class FATReLU(nn.Module):
    """`x` from the threshold on, else 0 (ProSparse, arXiv 2402.13516 §3.3)."""

    def __init__(self, threshold: float) -> None:
        """Keep the threshold."""
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activation of `x`, elementwise."""
        return torch.where(x >= self.threshold, x, 0)


class DoubleReLU(nn.Module):
    """The dReLU FFN, `down(relu(gate(x)) * relu(up(x)))` (TurboSparse, arXiv 2406.05955 §4)."""

    def __init__(self, mlp: nn.Module) -> None:
        """Take over the projections of a LLaMA FFN."""
        super().__init__()
        self.gate_proj = mlp.get_submodule("gate_proj")
        self.up_proj = mlp.get_submodule("up_proj")
        self.down_proj = mlp.get_submodule("down_proj")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the FFN's output for (..., d_model)."""
        output: torch.Tensor = self.down_proj(self.gate_proj(x).relu() * self.up_proj(x).relu())
        return output


def _activation(config: Config) -> tuple[Activation, float]:
    """Return the activation and FATReLU's threshold of a config with `hidden_act`.

    ProSparse's configs say `hidden_act: fatrelu` and give the threshold as `hidden_act_param`.

    Raises:
        CheckpointError: neither ReLU nor FATReLU, or a threshold that is no positive number.
    """
    name = config.get("hidden_act")
    if name == "fatrelu":
        return "fatrelu", real(config, "hidden_act_param", None)
    if name != "relu":
        refuse(
            "hidden_act",
            name,
            "'relu' or 'fatrelu'",
            "the model needs ReLU-fication first (train it with hidden_act 'relu'), because only "
            "ReLU makes FFN activations exactly zero",
        )
    return "relu", 0.0


def _gated_shape(
    config: Config,
    *,
    activation: Activation,
    threshold: float = 0.0,
    tied: bool = False,
    mistral: bool = False,
) -> ModelShape:
    """Read the sizes of a LLaMA-like config.

    Args:
        config: config.json.
        activation: the activation that the family found in it.
        threshold: FATReLU's.
        tied: whether embeddings are tied where the config does not say.
        mistral: attention may be limited to a sliding window. PowerInfer knows none, nor does
            llama.cpp of such a model, so the window limits the context instead.

    Raises:
        CheckpointError: a missing or impossible size, or what PowerInfer's graph does not have.
    """
    for key in ("attention_bias", "mlp_bias"):
        if flag(config, key):
            refuse(
                key, True, "false", "PowerInfer's llama graph has no biases, and psp writes none"
            )
    d_model, n_heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    if d_model % n_heads:
        refuse("num_attention_heads", n_heads, f"a divisor of hidden_size {d_model}", MEND)
    head_dim = number(config, "head_dim", default=d_model // n_heads)
    if head_dim % 2:
        refuse("head_dim", head_dim, "an even number", "rotary positions turn pairs")
    n_kv_heads = number(config, "num_key_value_heads", default=n_heads)
    if n_heads % n_kv_heads:
        refuse("num_key_value_heads", n_kv_heads, f"a divisor of {n_heads} heads", MEND)
    context = number(config, "max_position_embeddings")
    if mistral and config.get("sliding_window", _MISTRAL_WINDOW) is not None:
        context = min(context, number(config, "sliding_window", default=_MISTRAL_WINDOW))
    theta, scaling = read_rope(config)
    return ModelShape(
        d_model=d_model,
        d_ff=number(config, "intermediate_size"),
        n_layers=number(config, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=number(config, "vocab_size"),
        context_length=context,
        norm_eps=real(config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=flag(config, "tie_word_embeddings", default=tied),
        activation=activation,
        activation_threshold=threshold,
    )


def _relu_shape(config: Config, tied: bool = False) -> ModelShape:
    """Read a config whose activation is `hidden_act`, ReLU or FATReLU; see `_gated_shape`."""
    activation, threshold = _activation(config)
    mistral = "MistralForCausalLM" in config["architectures"]
    return _gated_shape(
        config, activation=activation, threshold=threshold, tied=tied, mistral=mistral
    )


def _minicpm_shape(config: Config) -> ModelShape:
    """Read MiniCPM's three constants too, which are folded into the weights."""
    # configuration_minicpm.py ties embeddings unless the config says otherwise.
    return replace(_relu_shape(config, tied=True), **_minicpm_factors(config))


def _minicpm_factors(config: Config) -> dict[str, Any]:
    """Return the factors of `ModelShape` that MiniCPM's three constants amount to.

    Source: OpenBMB/MiniCPM@5977a63 `model/modeling_minicpm.py`. The embedding is multiplied by
    `scale_emb`, what attention and FFN add to the residual stream by `scale_depth /
    sqrt(n_layers)`, and the head's input by `dim_model_base / hidden_size`. All three are linear,
    so they move into the embedding, into the output projections and into the (untied) head without
    changing the residual stream that predictors read.
    """
    d_model, n_layers = number(config, "hidden_size"), number(config, "num_hidden_layers")
    return {
        "embedding_scale": real(config, "scale_emb", 1.0),
        "residual_scale": real(config, "scale_depth", 1.0) / math.sqrt(n_layers),
        "output_scale": real(config, "dim_model_base", 1.0) / d_model,
    }


def _require_drelu(config: Config) -> None:
    activation = config.get("hidden_act")
    if activation not in ("relu", "drelu"):
        refuse("hidden_act", activation, "'relu'", "the model needs ReLU-fication first")


def _bamboo_shape(config: Config) -> ModelShape:
    _require_drelu(config)
    mistral = "LlamaForCausalLM" not in config["architectures"]
    return _gated_shape(config, activation="drelu", mistral=mistral)


def _model(shape: ModelShape, config: Config) -> nn.Module:
    """Build transformers' LLaMA with the family's activation; embeddings are never tied in it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context_length,
        rms_norm_eps=shape.norm_eps,
        rope_parameters=rope_parameters(shape.rope_theta, shape.rope_scaling),
        hidden_act="relu",
        tie_word_embeddings=False,
    )
    model: nn.Module = LlamaForCausalLM(settings)
    for block in model.get_submodule("model.layers").children():
        if shape.activation == "fatrelu":
            block.get_submodule("mlp").act_fn = FATReLU(shape.activation_threshold)
        if shape.activation == "drelu":
            block.mlp = DoubleReLU(block.get_submodule("mlp"))
    return model


_LAYERS = "model.layers"
_EMBEDDING = "model.embed_tokens"
_NORM = "model.norm"
_TENSORS = (
    weight(_EMBEDDING, "token_embd", "vocab_size", "d_model", scale="embedding_scale"),
    weight(_NORM, "output_norm", "d_model"),
    weight("lm_head", "output", "vocab_size", "d_model", tied_to=_EMBEDDING, scale="output_scale"),
    *in_blocks(
        _LAYERS,
        weight("input_layernorm", "attn_norm", "d_model"),
        weight("self_attn.q_proj", "attn_q", "q_rows", "d_model", transform="permute_q"),
        weight("self_attn.k_proj", "attn_k", "kv_rows", "d_model", transform="permute_k"),
        weight("self_attn.v_proj", "attn_v", "kv_rows", "d_model"),
        weight("self_attn.o_proj", "attn_output", "d_model", "q_rows", scale="residual_scale"),
        weight("post_attention_layernorm", "ffn_norm", "d_model"),
        weight("mlp.gate_proj", "ffn_gate", "d_ff", "d_model"),
        weight("mlp.up_proj", "ffn_up", "d_ff", "d_model"),
        weight(
            "mlp.down_proj",
            "ffn_down_t",
            "d_model",
            "d_ff",
            transform="transpose",
            scale="residual_scale",
        ),
    ),
)

LLAMA = Architecture(
    name="llama",
    hf_classes=("LlamaForCausalLM", "MistralForCausalLM"),
    claims=lambda config: config.get("hidden_act") not in ("fatrelu", "drelu"),
    gguf_name="llama",
    dense_note=(
        "dense file for timing only: llama.cpp and PowerInfer compute SiLU for arch llama in "
        "dense mode, so the text of this ReLU model is wrong"
    ),
    embeddings=(_EMBEDDING,),
    layers=_LAYERS,
    output_norm=_NORM,
    predictor_input="post_attention_layernorm",
    activation_taps=("mlp.gate_proj",),
    ffn_output="mlp.down_proj",
    gate="mlp.gate_proj.weight",
    ffn_norm="post_attention_layernorm.weight",
    ffn_down="mlp.down_proj.weight",
    centred=False,
    ffn_matrices=3,
    tensors=_TENSORS,
    read_shape=_relu_shape,
    make_model=_model,
)
"""LLaMA with a ReLU-gated FFN (ReGLU): ReluLLaMA, ProSparse models without FATReLU, and Mistral."""

PROSPARSE = replace(
    LLAMA,
    name="prosparse",
    hf_classes=("SparseLlamaForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"),
    claims=lambda config: (
        "SparseLlamaForCausalLM" in config["architectures"] or config.get("hidden_act") == "fatrelu"
    ),
)
"""ProSparse LLaMA, whose activation passes values from a threshold on (FATReLU).

Config: `hidden_act: fatrelu`, `hidden_act_param` the threshold, as in the published checkpoints of
arXiv 2402.13516, whose modelling code compares with `>=`. Also MiniCPM-S in llama-format, whose
constants are in the weights already.
"""

MINICPM = replace(
    LLAMA,
    name="minicpm",
    hf_classes=("MiniCPMForCausalLM",),
    claims=lambda config: True,
    read_shape=_minicpm_shape,
)
"""MiniCPM: LLaMA with three constants, see `_minicpm_shape`."""

BAMBOO = replace(
    LLAMA,
    name="bamboo",
    hf_classes=("BambooForCausalLM", "MistralForCausalLM", "LlamaForCausalLM"),
    claims=lambda config: (
        "BambooForCausalLM" in config["architectures"] or config.get("hidden_act") == "drelu"
    ),
    gguf_name="bamboo",
    dense_note="dense file for timing; PowerInfer computes dReLU, other programs may not",
    activation_taps=("mlp.gate_proj", "mlp.up_proj"),
    read_shape=_bamboo_shape,
)
"""Bamboo and TurboSparse-Mistral: Mistral with ReLU on both halves of the gated FFN (dReLU).

Source: the authors' modeling_bamboo.py (`down(act(gate(x)) * act(up(x))`) and arXiv 2406.05955 §4.
TurboSparse checkpoints hold predictors of their own (`mlp.predictor.*`), which mask the FFN when
they are run by their own code; traces are made of the model without that mask.
"""

GATED = (LLAMA, PROSPARSE, MINICPM, BAMBOO)


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What a model of a gated family computes otherwise than a LLaMA with SiLU.

    Attributes:
        activation: `relu`, `fatrelu` or `drelu`.
        activation_threshold: FATReLU passes values from this on; 0 for the others.
        embedding_scale: as in `ModelShape`, and so are the others.
        residual_scale: see there.
        output_scale: see there.
    """

    activation: Activation
    activation_threshold: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    output_scale: float = 1.0


def read_arithmetic(family: Architecture, config: Config) -> Arithmetic:
    """Read it from a config of one of `GATED`, which may else have what PowerInfer does not know.

    Raises:
        CheckpointError: neither ReLU nor FATReLU, or constants that are no positive numbers.
    """
    if family is BAMBOO:
        _require_drelu(config)
        return Arithmetic(activation="drelu")
    activation, threshold = _activation(config)
    factors = _minicpm_factors(config) if family is MINICPM else {}
    return Arithmetic(activation=activation, activation_threshold=threshold, **factors)
