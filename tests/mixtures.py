"""Tiny random SmallThinker checkpoints in the published layouts, and the published formula.

As `families` and `published`: nothing here knows `architectures`; the formula goes token by token,
head by head and expert by expert, and is given float64 weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from families import Variant
from published import (
    Config,
    Layer,
    Reference,
    Shapes,
    Tensors,
    attend,
    block_of,
    heads_of,
    rms_norm,
    rotate,
)

_COMMON: Config = {
    "architectures": ["SmallThinkerForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_smallthinker.SmallThinkerConfig",
        "AutoModelForCausalLM": "modeling_smallthinker.SmallThinkerForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": [2],
    "head_dim": 16,
    "hidden_size": 64,
    "initializer_range": 0.02,
    "max_position_embeddings": 128,
    "model_type": "smallthinker",
    "moe_ffn_hidden_size": 32,
    "moe_num_active_primary_experts": 2,
    "moe_num_primary_experts": 4,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1.5e6,
    "sliding_window_size": 4096,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.53.3",
    "use_cache": False,
    "vocab_size": 320,
}
SMALL: Config = _COMMON | {
    "model_name": "smallthinker_4b_instruct",
    "rope_layout": [1] * 3,
    "sliding_window_layout": [0] * 3,
    "tie_word_embeddings": True,
}
"""4BA0.6B: as many head rows as d_model, rotary positions everywhere, no window, a tied head."""

LARGE: Config = _COMMON | {
    "hidden_size": 96,
    "moe_num_active_primary_experts": 3,
    "moe_num_primary_experts": 6,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rope_layout": [0, 1, 1, 1, 0, 1],
    "sliding_window_layout": [0, 1, 1, 1, 0, 1],
    "tie_word_embeddings": False,
}
"""21BA3B: more head rows than d_model, NoPE and windowed layers in turn, a head of its own."""


def mixture_shapes(c: Config) -> Shapes:
    d, ff, size = c["hidden_size"], c["moe_ffn_hidden_size"], c["head_dim"]
    rows, kv_rows = size * c["num_attention_heads"], size * c["num_key_value_heads"]
    block: Shapes = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (rows, d),
        "self_attn.k_proj.weight": (kv_rows, d),
        "self_attn.v_proj.weight": (kv_rows, d),
        "self_attn.o_proj.weight": (d, rows),
        "post_attention_layernorm.weight": (d,),
        "block_sparse_moe.primary_router.weight": (c["moe_num_primary_experts"], d),
    }
    for number in range(c["moe_num_primary_experts"]):
        expert = f"block_sparse_moe.experts.{number}"
        block |= {f"{expert}.{part}.weight": (ff, d) for part in ("gate", "up")}
        block[f"{expert}.down.weight"] = (d, ff)
    shapes: Shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], d)
    for layer in range(c["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


@dataclass(frozen=True)
class Routed:
    """What a layer's router and experts did: for each token, the experts chosen and their gates."""

    chosen: list[list[int]]
    gates: list[dict[int, torch.Tensor]]


def routed_formula(c: Config, w: Tensors, ids: torch.Tensor) -> tuple[torch.Tensor, list[Routed]]:
    """Return logits and what the experts of each layer did."""
    eps, size, layers = c["rms_norm_eps"], c["head_dim"], []
    x = w["model.embed_tokens.weight"][ids]
    for number in range(c["num_hidden_layers"]):
        p = block_of(w, f"model.layers.{number}.")
        logits = x @ p["block_sparse_moe.primary_router.weight"].T  # before attention, no norm
        h = rms_norm(x, p["input_layernorm.weight"], eps)
        q, k, v = (
            heads_of(rows, rows.shape[1] // size)
            for rows in (h @ p[f"self_attn.{part}_proj.weight"].T for part in "qkv")
        )
        if c["rope_layout"][number]:
            q, k = rotate(q, c), rotate(k, c)
        window = c["sliding_window_size"] if c["sliding_window_layout"][number] else None
        x = x + attend(q, k, v, window) @ p["self_attn.o_proj.weight"].T
        h = rms_norm(x, p["post_attention_layernorm.weight"], eps)
        added, routed = _experts(c, p, logits, h)
        x = x + added
        layers.append(routed)
    x = rms_norm(x, w["model.norm.weight"], eps)
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T, layers


def _experts(
    c: Config, p: Tensors, logits: torch.Tensor, h: torch.Tensor
) -> tuple[torch.Tensor, Routed]:
    added, routed = torch.zeros_like(h), Routed([], [])
    for token, row in enumerate(logits):
        best = row.argsort(descending=True)[: c["moe_num_active_primary_experts"]].tolist()
        soft = c.get("moe_primary_router_apply_softmax", False)
        raw = [float(row[e].exp()) if soft else float(1 / (1 + (-row[e]).exp())) for e in best]
        gates = {}
        for expert, weight in zip(best, raw, strict=True):
            part = block_of(p, f"block_sparse_moe.experts.{expert}.")
            gates[expert] = part["gate.weight"] @ h[token]
            inner = gates[expert].clamp(min=0) * (part["up.weight"] @ h[token])
            added[token] += weight / sum(raw) * (part["down.weight"] @ inner)
        routed.chosen.append(best)
        routed.gates.append(gates)
    return added, routed


def mixture_formula(c: Config, w: Tensors, ids: torch.Tensor) -> Reference:
    layers: list[Layer] = []
    return Reference(routed_formula(c, w, ids)[0], layers)


_mixture = partial(Variant, family="smallthinker", shapes=mixture_shapes, formula=mixture_formula)

MIXTURES = (
    _mixture(name="smallthinker-4b", config=SMALL),
    _mixture(name="smallthinker-21b", config=LARGE, files="sharded safetensors"),
    _mixture(
        name="smallthinker-softmax",
        config=SMALL | {"moe_primary_router_apply_softmax": True, "torch_dtype": "float32"},
    ),
    _mixture(name="smallthinker-window", config=LARGE | {"sliding_window_size": 5}),
    _mixture(
        name="smallthinker-layouts-apart",
        config=LARGE
        | {
            "sliding_window_size": 7,
            "rope_layout": [1, 0, 0, 1, 1, 0],
            "sliding_window_layout": [1, 1, 0, 0, 1, 0],
            "tie_word_embeddings": True,
            "torch_dtype": "float16",
        },
    ),
)
"""The last one is none that was published: positions and windows are told apart by layer."""
