"""Falcon with ReLU: attention and FFN side by side in a block, both reading the block's input.

Layout: transformers `models/falcon/modeling_falcon.py`. Tap: PowerInfer@d3ebd7c
`llama.cpp:build_falcon` (the predictor reads `inpL`, the block's input). There is no dense file:
PowerInfer's dense graph wants `ffn_down_t`, which its dense loader (llm_load_tensors) never makes.
"""

from __future__ import annotations

from torch import nn

from architectures.config_json import MEND, Config, flag, number, real, refuse
from architectures.rope import read_rope, rope_kind, rope_parameters
from architectures.spec import Architecture, ModelShape, in_blocks, weight, with_bias


def _two_norms(config: Config) -> bool:
    """Whether attention and FFN have a norm each, as in Falcon-40B."""
    if not flag(config, "new_decoder_architecture"):
        return False
    return number(config, "num_ln_in_parallel_attn", default=2) == 2


def _kv_heads(config: Config, n_heads: int) -> int:
    if flag(config, "new_decoder_architecture"):
        return number(config, "num_kv_heads", default=n_heads)
    return 1 if flag(config, "multi_query", default=True) else n_heads


def _shape(config: Config) -> ModelShape:
    activation = config.get("activation", config.get("hidden_act"))
    if activation != "relu":
        refuse("activation", activation, "'relu'", "the model needs ReLU-fication first")
    for key, needed in (("parallel_attn", True), ("bias", False), ("alibi", False)):
        if flag(config, key, default=needed) is not needed:
            refuse(key, not needed, str(needed).lower(), "PowerInfer's falcon graph has it so")
    if rope_kind(config) != "default":
        # ggml's kernel for halves, see `gguf_export.pwri.hyperparameters.Graph.scalable`.
        remedy = "PowerInfer's falcon graph would scale positions twice"
        refuse("rope_type", rope_kind(config), "'default'", remedy)
    d_model, n_heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    if d_model % (2 * n_heads):
        refuse("num_attention_heads", n_heads, f"a divisor of {d_model} / 2", MEND)
    n_kv_heads = _kv_heads(config, n_heads)
    if n_heads % n_kv_heads:
        refuse("num_kv_heads", n_kv_heads, f"a divisor of {n_heads} heads", MEND)
    return ModelShape(
        d_model=d_model,
        d_ff=number(config, "ffn_hidden_size", default=4 * d_model),
        n_layers=number(config, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=d_model // n_heads,
        vocab_size=number(config, "vocab_size"),
        context_length=number(config, "max_position_embeddings", default=2048),
        norm_eps=real(config, "layer_norm_epsilon", 1e-5),
        rope_theta=read_rope(config)[0],
        tied_embeddings=flag(config, "tie_word_embeddings", default=True),
    )


def _model(shape: ModelShape, config: Config) -> nn.Module:
    from transformers import FalconConfig, FalconForCausalLM

    new = flag(config, "new_decoder_architecture")
    settings = FalconConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        ffn_hidden_size=shape.d_ff,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_kv_heads=shape.n_kv_heads,
        multi_query=flag(config, "multi_query", default=True),
        new_decoder_architecture=new,
        num_ln_in_parallel_attn=(2 if _two_norms(config) else 1) if new else None,
        parallel_attn=True,
        bias=False,
        alibi=False,
        activation="relu",
        layer_norm_epsilon=shape.norm_eps,
        max_position_embeddings=shape.context_length,
        rope_parameters=rope_parameters(shape.rope_theta, None),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tie_word_embeddings=False,
    )
    model: nn.Module = FalconForCausalLM(settings)
    return model


_LAYERS = "transformer.h"


def _falcon(norms: dict[str, str], two_norms: bool) -> Architecture:
    """Return a layout of the family, given its norms in a block and their names in a file.

    The FFN's norm comes first: PowerInfer calls it `attn_norm` in either layout.
    """
    ffn_norm = next(iter(norms))
    embedding, output_norm = "transformer.word_embeddings", "transformer.ln_f"
    blocks = in_blocks(
        _LAYERS,
        *(rule for names in norms.items() for rule in with_bias(*names, "d_model")),
        weight(
            "self_attention.query_key_value",
            "attn_qkv",
            "qkv_rows",
            "d_model",
            transform="group_qkv",
        ),
        weight("self_attention.dense", "attn_output", "d_model", "q_rows"),
        weight("mlp.dense_h_to_4h", "ffn_up", "d_ff", "d_model"),
        weight("mlp.dense_4h_to_h", "ffn_down_t", "d_model", "d_ff", transform="transpose"),
    )
    return Architecture(
        name="falcon",
        hf_classes=("FalconForCausalLM",),
        claims=lambda config: _two_norms(config) is two_norms,
        gguf_name="falcon",
        dense_note=None,
        embeddings=(embedding,),
        layers=_LAYERS,
        output_norm=output_norm,
        predictor_input=ffn_norm,
        activation_taps=("mlp.dense_h_to_4h",),
        ffn_output="mlp.dense_4h_to_h",
        gate="mlp.dense_h_to_4h.weight",
        ffn_norm=f"{ffn_norm}.weight",
        ffn_down="mlp.dense_4h_to_h.weight",
        centred=True,
        ffn_matrices=2,
        tensors=(
            weight(embedding, "token_embd", "vocab_size", "d_model"),
            *with_bias(output_norm, "output_norm", "d_model"),
            weight("lm_head", "output", "vocab_size", "d_model", tied_to=embedding),
            *blocks,
        ),
        read_shape=_shape,
        make_model=_model,
    )


FALCON_7B = _falcon({"input_layernorm": "attn_norm"}, two_norms=False)
"""One norm a block, read by attention and FFN alike."""

FALCON_40B = _falcon({"ln_mlp": "attn_norm", "ln_attn": "attn_norm_2"}, two_norms=True)
"""A norm for each half of the block."""

FALCON = (FALCON_7B, FALCON_40B)
