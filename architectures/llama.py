"""LLaMA with a ReLU-gated FFN (ReGLU): ReluLLaMA, ProSparse models without FATReLU.

Layout: transformers `models/llama/modeling_llama.py`. Tap and transforms: PowerInfer@d3ebd7c
`llama.cpp:build_llama_variants` (the predictor reads `ffn_inp`, the residual before the FFN norm).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from architectures.config import flag, number, real, refuse, rope_theta
from architectures.spec import Architecture, ModelShape, TensorRule


def _shape(config: Mapping[str, Any]) -> ModelShape:
    activation = config.get("hidden_act")
    if activation != "relu":
        refuse(
            "hidden_act",
            activation,
            "'relu'",
            "the model needs ReLU-fication first (train it with hidden_act 'relu'), because only "
            "ReLU makes FFN activations exactly zero",
        )
    for key in ("attention_bias", "mlp_bias"):
        if flag(config, key):
            refuse(key, True, "false", "PowerInfer's llama graph has no biases")
    d_model, n_heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    if d_model % n_heads:
        refuse("num_attention_heads", n_heads, f"a divisor of hidden_size {d_model}", "mend it")
    head_dim = number(config, "head_dim", default=d_model // n_heads)
    if head_dim * n_heads != d_model:
        refuse("head_dim", head_dim, f"{d_model // n_heads}", "PowerInfer derives it from sizes")
    return ModelShape(
        d_model=d_model,
        d_ff=number(config, "intermediate_size"),
        n_layers=number(config, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=number(config, "num_key_value_heads", default=n_heads),
        head_dim=head_dim,
        vocab_size=number(config, "vocab_size"),
        context_length=number(config, "max_position_embeddings"),
        norm_eps=real(config, "rms_norm_eps", 1e-6),
        rope_theta=rope_theta(config),
        tied_embeddings=flag(config, "tie_word_embeddings"),
    )


def _block(source: str, target: str, *dims: str, **options: Any) -> TensorRule:
    return TensorRule(
        source=f"model.layers.{{layer}}.{source}.weight",
        target=f"blk.{{layer}}.{target}.weight",
        dims=dims,
        **options,
    )


LLAMA = Architecture(
    name="llama",
    hf_classes=("LlamaForCausalLM",),
    gguf_name="llama",
    activation="relu",
    model_class="LlamaForCausalLM",
    layers="model.layers",
    predictor_input="post_attention_layernorm",
    activation_taps=("mlp.gate_proj",),
    ffn_output="mlp.down_proj",
    gate="mlp.gate_proj.weight",
    ffn_norm="post_attention_layernorm.weight",
    ffn_down="mlp.down_proj.weight",
    tensors=(
        TensorRule(
            source="model.embed_tokens.weight",
            target="token_embd.weight",
            dims=("vocab_size", "d_model"),
        ),
        TensorRule(source="model.norm.weight", target="output_norm.weight", dims=("d_model",)),
        TensorRule(
            source="lm_head.weight",
            target="output.weight",
            dims=("vocab_size", "d_model"),
            tied_to="model.embed_tokens.weight",
        ),
        _block("input_layernorm", "attn_norm", "d_model"),
        _block("self_attn.q_proj", "attn_q", "q_rows", "d_model", transform="permute_q"),
        _block("self_attn.k_proj", "attn_k", "kv_rows", "d_model", transform="permute_k"),
        _block("self_attn.v_proj", "attn_v", "kv_rows", "d_model"),
        _block("self_attn.o_proj", "attn_output", "d_model", "q_rows"),
        _block("post_attention_layernorm", "ffn_norm", "d_model"),
        _block("mlp.gate_proj", "ffn_gate", "d_ff", "d_model"),
        _block("mlp.up_proj", "ffn_up", "d_ff", "d_model"),
        _block("mlp.down_proj", "ffn_down_t", "d_model", "d_ff", transform="transpose"),
    ),
    read_shape=_shape,
)
