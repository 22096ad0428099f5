"""SmallThinker: a mixture of experts with ReLU-gated experts and a router before attention.

The family's published code is remote code, which is never run: what it computes is written anew in
`architectures.smallthinker_graph`. Sources: PowerInfer/SmallThinker-4BA0.6B-Instruct's
configuration_smallthinker.py and modeling_smallthinker.py; PowerInfer@d3ebd7c
smallthinker/src/llama-model.cpp:llm_build_smallthinker.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from architectures.config_json import MEND, Config, flag, number, real, refuse
from architectures.rope import rope_kind
from architectures.smallthinker_graph import SmallThinker
from architectures.spec import (
    Architecture,
    Experts,
    LayerAttention,
    ModelShape,
    in_blocks,
    weight,
)

_CODE = "SmallThinker's published code computes nothing else"
_FIXED: dict[str, tuple[object, ...]] = {
    "moe_enable_early_router": (None, True),
    "moe_enable_secondary_experts": (None, False),
    "moe_num_secondary_experts": (None, 0),
    "moe_secondary_expert_size": (None, 0),
    "moe_shared_primary_experts": (None, 0),
    "moe_primary_router_use_sigmoid": (None,),
    "use_qk_norm": (None, False),
    "attention_bias": (None, False),
    "hidden_act": (None, "relu"),
    "norm_topk_prob": (None, True),
}
"""Keys of configs old and new that may say nothing but what the published graph computes.

`norm_topk_prob` is in the published configs and no code reads it: the weights of chosen experts are
always divided by their sum.
"""


def _shape(config: Config) -> ModelShape:
    """Read the sizes of a SmallThinker config.

    Raises:
        CheckpointError: a missing or impossible size, or what the published code does not compute.
    """
    _check_fixed(config)
    n_layers, n_heads = number(config, "num_hidden_layers"), number(config, "num_attention_heads")
    n_kv_heads, head_dim = number(config, "num_key_value_heads"), number(config, "head_dim")
    if n_heads % n_kv_heads:
        refuse("num_key_value_heads", n_kv_heads, f"a divisor of {n_heads} heads", MEND)
    if head_dim % 2:
        refuse("head_dim", head_dim, "an even number", "rotary positions turn pairs")
    return ModelShape(
        d_model=number(config, "hidden_size"),
        d_ff=number(config, "moe_ffn_hidden_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=number(config, "vocab_size"),
        context_length=number(config, "max_position_embeddings"),
        norm_eps=real(config, "rms_norm_eps", 1e-6),
        rope_theta=real(config, "rope_theta", 1e6),
        tied_embeddings=flag(config, "tie_word_embeddings", default=True),
        experts=_experts(config),
        attention=_attention(config, n_layers),
    )


def _check_fixed(config: Config) -> None:
    for key, allowed in _FIXED.items():
        if config.get(key) not in allowed:
            refuse(key, config[key], f"{allowed[-1]!r}", _CODE)
    if not all(_switches(config, "moe_layer_layout", number(config, "num_hidden_layers"), True)):
        refuse("moe_layer_layout", config["moe_layer_layout"], "1 for every layer", _CODE)
    if rope_kind(config) != "default":
        remedy = "SmallThinker's rotary positions are exported without scaling only"
        refuse("rope_scaling", rope_kind(config), "null", remedy)


def _experts(config: Config) -> Experts:
    count = number(config, "moe_num_primary_experts")
    chosen = number(config, "moe_num_active_primary_experts")
    if chosen > count:
        refuse("moe_num_active_primary_experts", chosen, f"at most {count} experts", MEND)
    softmax = config.get("moe_primary_router_apply_softmax")
    if softmax not in (None, True, False):
        refuse("moe_primary_router_apply_softmax", softmax, "true or false", MEND)
    return Experts(count=count, chosen=chosen, gating="softmax" if softmax else "sigmoid")


def _attention(config: Config, n_layers: int) -> LayerAttention:
    windowed = _switches(config, "sliding_window_layout", n_layers, False)
    return LayerAttention(
        rotary=_switches(config, "rope_layout", n_layers, True),
        windowed=windowed,
        window=number(config, "sliding_window_size", default=4096) if any(windowed) else 0,
    )


def _switches(config: Config, key: str, n_layers: int, default: bool) -> tuple[bool, ...]:
    """Return a list of 0 and 1 for every layer.

    Raises:
        CheckpointError: of another length, or of other values.
    """
    found: Any = config.get(key)
    if found is None:
        return (default,) * n_layers
    valid = isinstance(found, list) and all(value in (0, 1) for value in found)
    if not valid or len(found) != n_layers:
        refuse(key, found, f"a list of {n_layers} numbers, each 0 or 1", MEND)
    return tuple(bool(value) for value in found)


def _model(shape: ModelShape, config: Config) -> nn.Module:
    return SmallThinker(shape)


_EMBEDDING = "model.embed_tokens"
_NORM = "model.norm"
_EXPERT = "block_sparse_moe.experts.{expert}"

SMALLTHINKER = Architecture(
    name="smallthinker",
    hf_classes=("SmallThinkerForCausalLM",),
    gguf_name="smallthinker",
    dense_note=None,
    embeddings=(_EMBEDDING,),
    layers="model.layers",
    output_norm=_NORM,
    predictor_input="post_attention_layernorm",
    activation_taps=(f"{_EXPERT}.gate",),
    ffn_output=f"{_EXPERT}.down",
    gate=f"{_EXPERT}.gate.weight",
    ffn_norm="post_attention_layernorm.weight",
    ffn_down=f"{_EXPERT}.down.weight",
    centred=False,
    ffn_matrices=3,
    tensors=(
        weight(_EMBEDDING, "token_embd", "vocab_size", "d_model"),
        weight(_NORM, "output_norm", "d_model"),
        weight("lm_head", "output", "vocab_size", "d_model", tied_to=_EMBEDDING),
        *in_blocks(
            "model.layers",
            weight("input_layernorm", "attn_norm", "d_model"),
            weight("self_attn.q_proj", "attn_q", "q_rows", "d_model"),
            weight("self_attn.k_proj", "attn_k", "kv_rows", "d_model"),
            weight("self_attn.v_proj", "attn_v", "kv_rows", "d_model"),
            weight("self_attn.o_proj", "attn_output", "d_model", "q_rows"),
            weight("post_attention_layernorm", "ffn_norm", "d_model"),
            weight("block_sparse_moe.primary_router", "ffn_gate_inp", "n_experts", "d_model"),
            weight(f"{_EXPERT}.gate", "ffn_gate_exps", "d_ff", "d_model"),
            weight(f"{_EXPERT}.up", "ffn_up_exps", "d_ff", "d_model"),
            weight(f"{_EXPERT}.down", "ffn_down_exps", "d_model", "d_ff", transform="transpose"),
        ),
    ),
    read_shape=_shape,
    make_model=_model,
)
"""Both published layouts.

4BA0.6B: tied head, rotary positions and full attention in every layer. 21BA3B: a head of its own;
every fourth layer, from the first on, has full attention without positions, the others a window of
4096 tokens and rotary positions.
"""
