"""What the LLaMA-like families share: RMSNorm, rotary positions, a gated FFN, no biases.

Layout and names: transformers `models/llama/modeling_llama.py`. Tap and transforms:
PowerInfer@d3ebd7c `llama.cpp:build_llama_variants` (the predictor reads `ffn_inp`, the residual
before the FFN norm).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from architectures.config import flag, number, real, refuse
from architectures.rope import read_rope, rope_parameters
from architectures.spec import Architecture, Config, ModelShape, TensorRule

if TYPE_CHECKING:
    from architectures.spec import Activation

_MISTRAL_WINDOW = 4096
"""Mistral's sliding window where the config has no such key (transformers MistralConfig)."""


def relu_activation(config: Config) -> tuple[Activation, float]:
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


def gated_shape(
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
        mistral: attention may be limited to a sliding window. PowerInfer knows none, so the
            window limits the context instead.

    Raises:
        CheckpointError: a missing or impossible size, or what PowerInfer's graph does not have.
    """
    for key in ("attention_bias", "mlp_bias"):
        if flag(config, key):
            refuse(key, True, "false", "PowerInfer's llama graph has no biases")
    d_model, n_heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    if d_model % n_heads:
        refuse("num_attention_heads", n_heads, f"a divisor of hidden_size {d_model}", "mend it")
    head_dim = number(config, "head_dim", default=d_model // n_heads)
    if head_dim * n_heads != d_model:
        refuse("head_dim", head_dim, f"{d_model // n_heads}", "PowerInfer derives it from sizes")
    if head_dim % 2:
        refuse("head_dim", head_dim, "an even number", "rotary positions turn pairs")
    n_kv_heads = number(config, "num_key_value_heads", default=n_heads)
    if n_heads % n_kv_heads:
        refuse("num_key_value_heads", n_kv_heads, f"a divisor of {n_heads} heads", "mend it")
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


def relu_shape(config: Config, tied: bool = False) -> ModelShape:
    """Read a config whose activation is `hidden_act`, ReLU or FATReLU; see `gated_shape`."""
    activation, threshold = relu_activation(config)
    mistral = "MistralForCausalLM" in config["architectures"]
    return gated_shape(
        config, activation=activation, threshold=threshold, tied=tied, mistral=mistral
    )


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


def gated_model(shape: ModelShape, config: Config) -> nn.Module:
    """Build transformers' LLaMA with the family's activation; embeddings are never tied in it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
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


def _block(source: str, target: str, *dims: str, **options: Any) -> TensorRule:
    return TensorRule(
        source=f"model.layers.{{layer}}.{source}.weight",
        target=f"blk.{{layer}}.{target}.weight",
        dims=dims,
        **options,
    )


GATED_TENSORS = (
    TensorRule(
        source="model.embed_tokens.weight",
        target="token_embd.weight",
        dims=("vocab_size", "d_model"),
        scale="embedding_scale",
    ),
    TensorRule(source="model.norm.weight", target="output_norm.weight", dims=("d_model",)),
    TensorRule(
        source="lm_head.weight",
        target="output.weight",
        dims=("vocab_size", "d_model"),
        tied_to="model.embed_tokens.weight",
        scale="output_scale",
    ),
    _block("input_layernorm", "attn_norm", "d_model"),
    _block("self_attn.q_proj", "attn_q", "q_rows", "d_model", transform="permute_q"),
    _block("self_attn.k_proj", "attn_k", "kv_rows", "d_model", transform="permute_k"),
    _block("self_attn.v_proj", "attn_v", "kv_rows", "d_model"),
    _block("self_attn.o_proj", "attn_output", "d_model", "q_rows", scale="residual_scale"),
    _block("post_attention_layernorm", "ffn_norm", "d_model"),
    _block("mlp.gate_proj", "ffn_gate", "d_ff", "d_model"),
    _block("mlp.up_proj", "ffn_up", "d_ff", "d_model"),
    _block(
        "mlp.down_proj",
        "ffn_down_t",
        "d_model",
        "d_ff",
        transform="transpose",
        scale="residual_scale",
    ),
)


_DENSE_NOTE = (
    "dense file for timing only: llama.cpp and PowerInfer compute SiLU for arch llama in dense "
    "mode, so the text of this ReLU model is wrong"
)


def gated_family(**options: Any) -> Architecture:
    """Return a LLaMA-like family; `options` are what distinguishes it."""
    facts: dict[str, Any] = {
        "base": "model",
        "layers": "model.layers",
        "predictor_input": "post_attention_layernorm",
        "activation_taps": ("mlp.gate_proj",),
        "ffn_output": "mlp.down_proj",
        "gate": "mlp.gate_proj.weight",
        "ffn_norm": "post_attention_layernorm.weight",
        "ffn_down": "mlp.down_proj.weight",
        "centred": False,
        "ffn_matrices": 3,
        "dense_note": _DENSE_NOTE,
        "tensors": GATED_TENSORS,
        "make_model": gated_model,
    }
    return Architecture(**(facts | options))
