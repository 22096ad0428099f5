"""OPT: LayerNorm, biases, learned positions, a plain ReLU FFN.

Layout: transformers `models/opt/modeling_opt.py`. Tap: PowerInfer@d3ebd7c `llama.cpp:build_opt`
(the predictor reads `ffn_inp`, the residual before the FFN norm).
"""

from __future__ import annotations

from torch import nn

from architectures.config_json import MEND, Config, flag, number, refuse
from architectures.spec import Architecture, ModelShape, in_blocks, weight, with_bias

_NORM_EPS = 1e-5
"""torch's default, which transformers' OPT does not change."""

_NEEDED = {
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
}


def _shape(config: Config) -> ModelShape:
    activation = config.get("activation_function", "relu")
    if activation != "relu":
        refuse("activation_function", activation, "'relu'", "only ReLU makes activations zero")
    for key, needed in _NEEDED.items():
        if flag(config, key, default=needed) is not needed:
            found = str(not needed).lower()
            refuse(key, not needed, str(needed).lower(), f"PowerInfer has no graph for {found}")
    d_model, n_heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    width = number(config, "word_embed_proj_dim", default=d_model)
    if width != d_model:
        refuse("word_embed_proj_dim", width, str(d_model), "PowerInfer has no projection there")
    if d_model % n_heads:
        refuse("num_attention_heads", n_heads, f"a divisor of hidden_size {d_model}", MEND)
    return ModelShape(
        d_model=d_model,
        d_ff=number(config, "ffn_dim"),
        n_layers=number(config, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d_model // n_heads,
        vocab_size=number(config, "vocab_size"),
        context_length=number(config, "max_position_embeddings"),
        norm_eps=_NORM_EPS,
        rope_theta=0.0,
        tied_embeddings=flag(config, "tie_word_embeddings", default=True),
    )


def _model(shape: ModelShape, config: Config) -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    settings = OPTConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        word_embed_proj_dim=shape.d_model,
        ffn_dim=shape.d_ff,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        max_position_embeddings=shape.context_length,
        activation_function="relu",
        dropout=0.0,
        tie_word_embeddings=False,
    )
    model: nn.Module = OPTForCausalLM(settings)
    return model


_LAYERS = "model.decoder.layers"
_EMBEDDING = "model.decoder.embed_tokens"
_POSITIONS = "model.decoder.embed_positions"
_NORM = "model.decoder.final_layer_norm"
_TENSORS = (
    weight(_EMBEDDING, "token_embd", "vocab_size", "d_model"),
    weight(_POSITIONS, "position_embd", "positions", "d_model"),
    *with_bias(_NORM, "output_norm", "d_model"),
    weight("lm_head", None, "vocab_size", "d_model", tied_to=_EMBEDDING),
    *in_blocks(
        _LAYERS,
        *with_bias("self_attn_layer_norm", "attn_norm", "d_model"),
        *with_bias("self_attn.q_proj", "attn_q", "d_model", "d_model"),
        *with_bias("self_attn.k_proj", "attn_k", "d_model", "d_model"),
        *with_bias("self_attn.v_proj", "attn_v", "d_model", "d_model"),
        *with_bias("self_attn.out_proj", "attn_output", "d_model", "d_model"),
        *with_bias("final_layer_norm", "ffn_norm", "d_model"),
        *with_bias("fc1", "ffn_up", "d_ff", "d_model"),
        *with_bias("fc2", "ffn_down_t", "d_model", "d_ff", transform="transpose"),
    ),
)

OPT = Architecture(
    name="opt",
    hf_classes=("OPTForCausalLM",),
    gguf_name="opt",
    # Its positions' table has 2050 rows, whatever the file says (llm_load_hparams).
    context_length=2048,
    dense_note="dense file for timing; PowerInfer computes ReLU, llama.cpp has no arch opt",
    embeddings=(_EMBEDDING, _POSITIONS),
    layers=_LAYERS,
    output_norm=_NORM,
    predictor_input="final_layer_norm",
    activation_taps=("fc1",),
    ffn_output="fc2",
    gate="fc1.weight",
    ffn_norm="final_layer_norm.weight",
    ffn_down="fc2.weight",
    centred=True,
    ffn_matrices=2,
    tensors=_TENSORS,
    read_shape=_shape,
    make_model=_model,
)
