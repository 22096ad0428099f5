"""The published modelling code of every family: its tensors' names and plain-PyTorch formulas.

It knows neither `architectures` nor transformers, and goes head by head and pair by pair, so that a
mistake shared with the tested code is unlikely. Give the formulas float64 weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]

_TIED_BY_DEFAULT = ("MiniCPMForCausalLM", "OPTForCausalLM", "FalconForCausalLM")


@dataclass(frozen=True)
class Layer:
    """What one layer did on each token: (tokens, ...) floats and bools."""

    residual: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor | None
    active: torch.Tensor
    intermediate: torch.Tensor


@dataclass(frozen=True)
class Reference:
    """(tokens, vocab) logits and the layers in order."""

    logits: torch.Tensor
    layers: list[Layer]


def is_tied(c: Config) -> bool:
    return bool(c.get("tie_word_embeddings", c["architectures"][0] in _TIED_BY_DEFAULT))


def gated_shapes(c: Config, *, predictor: int = 0, inv_freq: bool = False) -> Shapes:
    """Return LLaMA's names, with TurboSparse's predictors or the buffers of old LLaMA files."""
    d, ff, n_heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    kv = d // n_heads * c.get("num_key_value_heads", n_heads)
    shapes: Shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    if not is_tied(c):
        shapes["lm_head.weight"] = (c["vocab_size"], d)
    block: Shapes = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (d, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, d),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (ff, d),
        "mlp.up_proj.weight": (ff, d),
        "mlp.down_proj.weight": (d, ff),
    }
    if predictor:
        block["mlp.predictor.fc1.weight"] = (predictor, d)
        block["mlp.predictor.fc2.weight"] = (ff, predictor)
    if inv_freq:
        block["self_attn.rotary_emb.inv_freq"] = (d // n_heads // 2,)
    return shapes | _blocks("model.layers", c, block)


def _blocks(prefix: str, c: Config, block: Shapes) -> Shapes:
    layers = range(c["num_hidden_layers"])
    return {f"{prefix}.{n}.{name}": shape for n in layers for name, shape in block.items()}


def opt_shapes(c: Config, *, prefix: str, head: bool) -> Shapes:
    """Return OPT's names, which begin in `model.decoder` or in `decoder`."""
    d, ff, wide = c["hidden_size"], c["ffn_dim"], c["vocab_size"]
    linears = {f"self_attn.{name}_proj": (d, d) for name in ("q", "k", "v", "out")}
    linears |= {"fc1": (ff, d), "fc2": (d, ff)}
    block: Shapes = {f"{name}.weight": shape for name, shape in linears.items()}
    block |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    norms: Shapes = {"weight": (d,), "bias": (d,)}
    for norm in ("self_attn_layer_norm", "final_layer_norm"):
        block |= {f"{norm}.{part}": shape for part, shape in norms.items()}
    return {
        f"{prefix}.embed_tokens.weight": (wide, d),
        f"{prefix}.embed_positions.weight": (c["max_position_embeddings"] + 2, d),
        **{f"{prefix}.final_layer_norm.{part}": shape for part, shape in norms.items()},
        **_blocks(f"{prefix}.layers", c, block),
        **({"lm_head.weight": (wide, d)} if head else {}),
    }


def falcon_shapes(c: Config, *, head: bool = True) -> Shapes:
    """Return Falcon's names."""
    d, n_heads = c["hidden_size"], c["num_attention_heads"]
    ff, kv = c.get("ffn_hidden_size", 4 * d), d // n_heads * _falcon_kv_heads(c)
    two = c.get("new_decoder_architecture") and c.get("num_ln_in_parallel_attn", 2) == 2
    block: Shapes = {
        "self_attention.query_key_value.weight": (d + 2 * kv, d),
        "self_attention.dense.weight": (d, d),
        "mlp.dense_h_to_4h.weight": (ff, d),
        "mlp.dense_4h_to_h.weight": (d, ff),
    }
    for norm in ("ln_attn", "ln_mlp") if two else ("input_layernorm",):
        block |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    return {
        "transformer.word_embeddings.weight": (c["vocab_size"], d),
        "transformer.ln_f.weight": (d,),
        "transformer.ln_f.bias": (d,),
        **_blocks("transformer.h", c, block),
        **({"lm_head.weight": (c["vocab_size"], d)} if head else {}),
    }


def _falcon_kv_heads(c: Config) -> int:
    if c.get("new_decoder_architecture"):
        return int(c["num_kv_heads"])
    return 1 if c.get("multi_query", True) else int(c["num_attention_heads"])


def block_of(w: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): tensor for n, tensor in w.items() if n.startswith(prefix)}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def layer_norm(w: Tensors, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def heads_of(x: torch.Tensor, count: int) -> torch.Tensor:
    """Turn (tokens, count · n) into (count, tokens, n)."""
    return torch.stack(x.chunk(count, dim=1))


def scaling_of(c: Config) -> tuple[str, Config]:
    """Return the kind of scaling of rotary positions and its values."""
    found = c.get("rope_scaling") or c.get("rope_parameters") or {}
    return str(found.get("rope_type", found.get("type", "default"))), found


def frequency(c: Config, i: int, half: int) -> float:
    """Return the frequency of pair i of a head (jquesnelle/yarn, LlamaYaRNScaledRotary)."""
    theta, (kind, values) = rope_base(c), scaling_of(c)
    plain = math.pow(theta, -i / half)
    if kind == "default":
        return plain
    kept = 0.0
    if kind == "yarn":
        turns = values["original_max_position_embeddings"] / (2 * math.pi)
        first = max(0, math.floor(half * math.log(turns / 32) / math.log(theta)))
        last = min(2 * half - 1, math.ceil(half * math.log(turns) / math.log(theta)))
        kept = 1 - min(1.0, max(0.0, (i - first) / (last - first)))
    return plain * kept + plain / float(values["factor"]) * (1 - kept)


def rotate(x: torch.Tensor, c: Config) -> torch.Tensor:
    """Turn the pairs (i, i + n / 2) of (heads, tokens, n) by each token's place."""
    half, (kind, values) = x.shape[2] // 2, scaling_of(c)
    turned = x.clone()
    for i in range(half):
        angle = torch.arange(x.shape[1], dtype=x.dtype) * frequency(c, i, half)
        a, b = x[:, :, i], x[:, :, i + half]
        turned[:, :, i] = a * angle.cos() - b * angle.sin()
        turned[:, :, i + half] = b * angle.cos() + a * angle.sin()
    return turned * (1 + 0.1 * math.log(values["factor"]) if kind == "yarn" else 1)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Return causal attention, (tokens, heads · n), within a sliding window if there is one."""
    place, out = torch.arange(q.shape[1]), []
    distance = place[:, None] - place[None, :]
    hidden = (distance < 0) | (distance >= (window or len(place)))
    for number, query in enumerate(q):
        group = number // (len(q) // len(k))
        score = torch.einsum("in,jn->ij", query, k[group]) / math.sqrt(q.shape[2])
        out.append(score.masked_fill(hidden, -math.inf).softmax(1) @ v[group])
    return torch.cat(out, dim=1)


def rope_base(c: Config) -> float:
    return float((c.get("rope_parameters") or c).get("rope_theta", 10000.0))


def gated_activation(
    c: Config, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return active neurons and the intermediate of modeling_sparsellama, _bamboo or llama."""
    if c["hidden_act"] == "fatrelu":
        active = torch.ge(gate, c["hidden_act_param"])
        return active, torch.where(active, gate, torch.zeros_like(gate)) * up
    if c["hidden_act"] == "drelu" or "BambooForCausalLM" in c["architectures"]:
        return (gate > 0) & (up > 0), gate.clamp(min=0) * up.clamp(min=0)
    assert c["hidden_act"] == "relu"
    return gate > 0, gate.clamp(min=0) * up


def gated_formula(c: Config, w: Tensors, ids: torch.Tensor) -> Reference:
    """LLaMA, Mistral, SparseLlama, Bamboo (without predictors) and MiniCPM."""
    minicpm = "MiniCPMForCausalLM" in c["architectures"]
    n_heads, eps = c["num_attention_heads"], c["rms_norm_eps"]
    kv_heads = int(c.get("num_key_value_heads") or n_heads)
    branch = c["scale_depth"] / math.sqrt(c["num_hidden_layers"]) if minicpm else 1.0
    window, layers = c.get("sliding_window"), []
    x = w["model.embed_tokens.weight"][ids] * (c["scale_emb"] if minicpm else 1.0)
    for number in range(c["num_hidden_layers"]):
        p = block_of(w, f"model.layers.{number}.")
        h = rms_norm(x, p["input_layernorm.weight"], eps)
        q = rotate(heads_of(h @ p["self_attn.q_proj.weight"].T, n_heads), c)
        k = rotate(heads_of(h @ p["self_attn.k_proj.weight"].T, kv_heads), c)
        v = heads_of(h @ p["self_attn.v_proj.weight"].T, kv_heads)
        residual = x + branch * (attend(q, k, v, window) @ p["self_attn.o_proj.weight"].T)
        h = rms_norm(residual, p["post_attention_layernorm.weight"], eps)
        gate, up = h @ p["mlp.gate_proj.weight"].T, h @ p["mlp.up_proj.weight"].T
        active, intermediate = gated_activation(c, gate, up)
        x = residual + branch * (intermediate @ p["mlp.down_proj.weight"].T)
        layers.append(Layer(residual, gate, up, active, intermediate))
    x = rms_norm(x, w["model.norm.weight"], eps)
    if minicpm:
        x = x / (c["hidden_size"] / c["dim_model_base"])
    return Reference(x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T, layers)


def opt_formula(c: Config, w: Tensors, ids: torch.Tensor, *, eps: float = 1e-5) -> Reference:
    w = {name.removeprefix("model.").removeprefix("decoder."): tensor for name, tensor in w.items()}
    n_heads, layers = c["num_attention_heads"], []
    x = w["embed_tokens.weight"][ids] + w["embed_positions.weight"][2 : 2 + len(ids)]
    for number in range(c["num_hidden_layers"]):
        p = block_of(w, f"layers.{number}.")

        def linear(name: str, x: torch.Tensor, p: Tensors = p) -> torch.Tensor:
            return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

        h = layer_norm(p, "self_attn_layer_norm", x, eps)
        q, k, v = (heads_of(linear(f"self_attn.{n}_proj", h), n_heads) for n in "qkv")
        residual = x + linear("self_attn.out_proj", attend(q, k, v))
        gate = linear("fc1", layer_norm(p, "final_layer_norm", residual, eps))
        x = residual + linear("fc2", gate.clamp(min=0))
        layers.append(Layer(residual, gate, None, gate > 0, gate.clamp(min=0)))
    return Reference(layer_norm(w, "final_layer_norm", x, eps) @ w["embed_tokens.weight"].T, layers)


def falcon_formula(c: Config, w: Tensors, ids: torch.Tensor) -> Reference:
    n_heads, groups, eps = c["num_attention_heads"], _falcon_kv_heads(c), c["layer_norm_epsilon"]
    size, layers = c["hidden_size"] // n_heads, []
    x = w["transformer.word_embeddings.weight"][ids]
    for number in range(c["num_hidden_layers"]):
        p = block_of(w, f"transformer.h.{number}.")
        one = "input_layernorm.weight" in p
        a = layer_norm(p, "input_layernorm" if one else "ln_attn", x, eps)
        m = layer_norm(p, "input_layernorm" if one else "ln_mlp", x, eps)
        # The fused rows: for each group its queries, then its key, then its value.
        fused = (a @ p["self_attention.query_key_value.weight"].T).chunk(groups, dim=1)
        parts = [part.reshape(len(ids), -1, size).transpose(0, 1) for part in fused]
        q, k = torch.cat([part[:-2] for part in parts]), torch.stack([part[-2] for part in parts])
        v = torch.stack([part[-1] for part in parts])
        mixed = attend(rotate(q, c), rotate(k, c), v) @ p["self_attention.dense.weight"].T
        gate = m @ p["mlp.dense_h_to_4h.weight"].T
        layers.append(Layer(x, gate, None, gate > 0, gate.clamp(min=0)))
        x = x + mixed + gate.clamp(min=0) @ p["mlp.dense_4h_to_h.weight"].T
    x = layer_norm(w, "transformer.ln_f", x, eps)
    tied = c.get("tie_word_embeddings", True)
    head = w["transformer.word_embeddings.weight" if tied else "lm_head.weight"]
    return Reference(x @ head.T, layers)
