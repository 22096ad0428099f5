"""The SmallThinker config that a file of several experts amounts to, as the programs compute it.

Such a file has no layout of positions and windows: both llama.cpp and PowerInfer's second engine
derive it from whether there is a window. Source: llama.cpp@0c1e570 src/models/smallthinker.cpp;
PowerInfer@d3ebd7c smallthinker/src/llama-model.cpp:llama_model::load_hparams.
"""

from __future__ import annotations

from typing import Any

from gguf import ExpertGatingFuncType

from architectures.gguf_model.keys import Keys

STEP = 4
"""With a window, every fourth layer from the first on has neither it nor rotary positions."""

WINDOW = 4096
"""The window, whatever number the key says."""

_GATINGS = {int(ExpertGatingFuncType.SOFTMAX): True, int(ExpertGatingFuncType.SIGMOID): False}


def program_layouts(n_layers: int, *, window: bool) -> tuple[list[int], list[int]]:
    """Return of each layer whether it has rotary positions and whether it has a window, 0 or 1.

    Args:
        n_layers: of the model. If there are four, all have rotary positions.
        window: whether the file has a key of a window.
    """
    turned = [int(layer % STEP != 0) for layer in range(n_layers)]
    if not window:
        return [1] * n_layers, [0] * n_layers
    return ([1] * n_layers if n_layers == STEP else turned), turned


def mixture_config(keys: Keys) -> dict[str, Any]:
    """Return the config.

    Raises:
        CheckpointError: a key that is missing or that this graph has no place for.
    """
    remedy = "pass the model's Hugging Face directory"
    gating = keys.size("expert_gating_func", 0)
    if gating not in _GATINGS:
        key = keys.full("expert_gating_func")
        raise keys.error(
            f"key {key} is {gating or 'missing'}, expected 1 (softmax) or 2 (sigmoid): llama.cpp "
            "stops at such a file, and PowerInfer's second engine takes softmax",
            "write the file with psp export-gguf, or pass the model's Hugging Face directory",
        )
    for key, neutral in (("rope.scaling.factor", (0, 1)), ("expert_weights_scale", (0, 1))):
        if keys.real(key, 1.0) not in neutral:
            raise keys.error(f"key {keys.full(key)} is {keys.real(key):g}, expected 1", remedy)
    if keys.has("attention.sliding_window_pattern"):
        key = keys.full("attention.sliding_window_pattern")
        raise keys.error(f"key {key} is there, which only llama.cpp reads", remedy)
    n_layers, n_heads = keys.size("block_count"), keys.size("attention.head_count")
    window = keys.size("attention.sliding_window", 0) > 0
    rotary, windowed = program_layouts(n_layers, window=window)
    head_dim = keys.size("attention.key_length", keys.size("embedding_length") // max(n_heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.size(key, head_dim) != head_dim:
            raise keys.error(f"key {keys.full(key)} is not the head's {head_dim}", remedy)
    return {
        "architectures": ["SmallThinkerForCausalLM"],
        "model_type": "smallthinker",
        "head_dim": head_dim,
        "num_key_value_heads": keys.size("attention.head_count_kv", n_heads),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.real("rope.freq_base", 10000.0),
        "rope_layout": rotary,
        "sliding_window_layout": windowed,
        "sliding_window_size": WINDOW,
        "moe_num_primary_experts": keys.size("expert_count"),
        "moe_num_active_primary_experts": keys.size("expert_used_count"),
        "moe_ffn_hidden_size": keys.size(
            "expert_feed_forward_length", keys.size("feed_forward_length")
        ),
        "moe_primary_router_apply_softmax": _GATINGS[gating],
    }
