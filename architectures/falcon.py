"""Falcon with ReLU: attention and FFN side by side in a block, both reading the block's input.

Layout: transformers `models/falcon/modeling_falcon.py`. Tap: PowerInfer@d3ebd7c
`llama.cpp:build_falcon` (the predictor reads `inpL`, the block's input).
"""

from __future__ import annotations

from torch import nn

from architectures.config import flag, number, real, refuse, rope_theta
from architectures.spec import Architecture, Config, ModelShape, TensorRule


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
    d_model, n_heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    if d_model % (2 * n_heads):
        refuse("num_attention_heads", n_heads, f"a divisor of {d_model} / 2", "mend it")
    n_kv_heads = _kv_heads(config, n_heads)
    if n_heads % n_kv_heads:
        refuse("num_kv_heads", n_kv_heads, f"a divisor of {n_heads} heads", "mend it")
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
        rope_theta=rope_theta(config),
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
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tie_word_embeddings=False,
    )
    model: nn.Module = FalconForCausalLM(settings)
    return model


def _norm(name: str) -> tuple[TensorRule, TensorRule]:
    return (
        TensorRule(source=f"transformer.{name}.weight", dims=("d_model",)),
        TensorRule(source=f"transformer.{name}.bias", dims=("d_model",)),
    )


def _matrix(name: str, *dims: str) -> TensorRule:
    return TensorRule(source=f"transformer.h.{{layer}}.{name}.weight", dims=dims)


def _falcon(ffn_norm: str, norms: tuple[str, ...], two_norms: bool) -> Architecture:
    rules = [rule for name in norms for rule in _norm(f"h.{{layer}}.{name}")]
    return Architecture(
        name="falcon",
        hf_classes=("FalconForCausalLM",),
        claims=lambda config: _two_norms(config) is two_norms,
        base="transformer",
        layers="transformer.h",
        predictor_input=ffn_norm,
        activation_taps=("mlp.dense_h_to_4h",),
        ffn_output="mlp.dense_4h_to_h",
        gate="mlp.dense_h_to_4h.weight",
        ffn_norm=f"{ffn_norm}.weight",
        ffn_down="mlp.dense_4h_to_h.weight",
        centred=True,
        ffn_matrices=2,
        tensors=(
            TensorRule(source="transformer.word_embeddings.weight", dims=("vocab_size", "d_model")),
            *_norm("ln_f"),
            TensorRule(
                source="lm_head.weight",
                dims=("vocab_size", "d_model"),
                tied_to="transformer.word_embeddings.weight",
            ),
            *rules,
            _matrix("self_attention.query_key_value", "qkv_rows", "d_model"),
            _matrix("self_attention.dense", "d_model", "q_rows"),
            _matrix("mlp.dense_h_to_4h", "d_ff", "d_model"),
            _matrix("mlp.dense_4h_to_h", "d_model", "d_ff"),
        ),
        read_shape=_shape,
        make_model=_model,
    )


FALCON_7B = _falcon("input_layernorm", ("input_layernorm",), two_norms=False)
"""One norm a block, read by attention and FFN alike."""

FALCON_40B = _falcon("ln_mlp", ("ln_attn", "ln_mlp"), two_norms=True)
"""A norm for each half of the block."""
