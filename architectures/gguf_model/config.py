"""The config.json that says what a GGUF file's metadata says.

Keys: llama.cpp's gguf-py constants and PowerInfer@d3ebd7c llama.cpp:LLM_KV_NAMES. What a file
cannot say, the activation above all, comes from the caller or from what its programs compute.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from gguf import GGUFValueType

from architectures.config_json import MEND, ConfigError
from architectures.gguf_model.activation import activation_of, other_activation
from architectures.gguf_model.keys import FETCH_FILE, Keys, text_of
from architectures.gguf_model.mixture import mixture_config
from architectures.gguf_model.one_expert import check_one_expert_keys, check_routers
from architectures.gguf_model.tokenizer_files import special_ids
from architectures.spec import POSITION_OFFSET
from common.errors import CheckpointError
from gguf_files.names import ACTIVATION_KEY, SMALLTHINKER
from gguf_files.reader import GGUFFile

_EMBEDDING, _HEAD, _POSITIONS = "token_embd.weight", "output.weight", "position_embd.weight"
_FREQUENCIES = "rope_freqs.weight"
_SECOND_NORM = "blk.0.attn_norm_2.weight"
_NEUTRAL = {
    "embedding_scale": 1,
    "residual_scale": 1,
    "logit_scale": 1,
    "attention.scale": 1,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "expert_count": 0,
}
"""Keys that change what a graph computes, and the value with which they do not."""

_OWN_KEYS = {
    "minicpm": ("embedding_scale", "residual_scale", "logit_scale"),
    SMALLTHINKER: ("expert_count",),
}
"""Those of them that an architecture has a place for."""

_KEYS = {
    "hidden_size": ("embedding_length",),
    "num_hidden_layers": ("block_count",),
    "num_attention_heads": ("attention.head_count",),
    "num_key_value_heads": ("attention.head_count_kv",),
    "num_kv_heads": ("attention.head_count_kv",),
    "head_dim": ("attention.key_length",),
    "intermediate_size": ("feed_forward_length",),
    "ffn_hidden_size": ("feed_forward_length",),
    "ffn_dim": ("feed_forward_length",),
    "max_position_embeddings": ("context_length",),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon",),
    "layer_norm_epsilon": ("attention.layer_norm_epsilon",),
    "scale_emb": ("embedding_scale",),
    "rope_theta": ("rope.freq_base",),
    "rope_type": ("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
    "factor": ("rope.scaling.factor", "rope.scale_linear"),
    "original_max_position_embeddings": ("rope.scaling.original_context_length", "context_length"),
}
"""Where a config's values come from, after the architecture's name; the first that is there."""

_ACTIVATIONS = ("hidden_act", "hidden_act_param", "activation", "activation_function")

_SCALING = {"type", "factor", "original_context_length", "finetuned"}
"""What is understood after `rope.scaling.`."""


def config_of(file: GGUFFile, activation: str | None) -> dict[str, Any]:
    """Return a Hugging Face config.

    Args:
        file: dense (`GGUF`) or sparse (`PWRI`).
        activation: of its model where the file names none, `fatrelu:T` with its threshold.

    Raises:
        CheckpointError: an architecture that psp does not support, keys that are missing or
            impossible, or an activation other than the file's.
    """
    name = _architecture(file)
    keys = Keys(file, name)
    if text_of(getattr(file.values.get("general.type"), "data", b"model")) == "adapter":
        raise keys.error("is an adapter, not a model", "merge it into its model first")
    if keys.size("block_count") > len(file.tensors):
        raise keys.error(f"block_count is {keys.size('block_count')}, more than there are tensors")
    own = _OWN_KEYS.get(name, ())
    for key, value in _NEUTRAL.items():
        if key not in own and keys.has(key) and keys.real(key) != value:
            remedy = "psp knows no such model of this architecture"
            raise keys.error(f"key {keys.full(key)} is {keys.real(key):g}", remedy)
    common = {
        "hidden_size": keys.size("embedding_length"),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": keys.size("attention.head_count"),
        "vocab_size": _rows(keys, _EMBEDDING),
        "max_position_embeddings": keys.size("context_length"),
        "tie_word_embeddings": _HEAD not in file.tensors,
        **special_ids(file),
    }
    return common | _FAMILIES[name](keys, activation)


def in_keys(file: GGUFFile, activation: str | None, error: ConfigError) -> CheckpointError:
    """Return a refusal of what `config_of` gave in words of the file that it is about.

    Args:
        file: see `config_of`.
        activation: see `config_of`.
        error: about a key of config.json.
    """
    keys = Keys(file, _architecture(file))
    if error.key in _ACTIVATIONS:
        return other_activation(keys, activation, error)
    names = _KEYS.get(error.key, ())
    told = next((f"key {keys.full(name)}" for name in names if keys.has(name)), None)
    if told is None:
        told = f"key {keys.full(names[0])}, which is not there," if names else error.key
    expected = error.expected.replace("'default'", "'none'")
    for name, (first, *_) in _KEYS.items():
        expected = re.sub(rf"\b{name}\b", keys.full(first), expected)
    remedy = FETCH_FILE if error.remedy in (MEND, None) else error.remedy
    return keys.error(f"{told} is {error.found!r}, expected {expected}", remedy)


def _architecture(file: GGUFFile) -> str:
    try:
        name: str = file.value("general.architecture", GGUFValueType.STRING)
    except Exception as error:
        raise CheckpointError(
            f"{file.path}: names no architecture", "pass a model's GGUF file"
        ) from error
    if name not in _FAMILIES:
        raise CheckpointError(
            f"{file.path}: architecture {name!r} is not supported",
            f"supported: {', '.join(_FAMILIES)}",
        )
    return name


def _rows(keys: Keys, name: str) -> int:
    info = keys.file.tensors.get(name)
    if info is None:
        raise keys.error(f"tensor {name} is missing")
    return info.shape[0]


def _llama(keys: Keys, activation: str | None) -> dict[str, Any]:
    n_heads = keys.size("attention.head_count")
    head_dim = keys.size("attention.key_length", keys.size("embedding_length") // max(n_heads, 1))
    context = keys.size("context_length")
    window = keys.size("attention.sliding_window", context) or context  # 0 is none
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": keys.size("feed_forward_length"),
        "num_key_value_heads": keys.size("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        # PowerInfer has no window: it limits the context, as Mistral's does in its family.
        "max_position_embeddings": min(context, window),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "attention_bias": False,
        "mlp_bias": False,
        **_rope(keys, head_dim),
        **activation_of(keys, activation, dense="silu"),
    }


def _bamboo(keys: Keys, activation: str | None) -> dict[str, Any]:
    # The class is one that transformers has; `drelu` makes the family.
    return _llama(keys, None) | activation_of(keys, activation, always="drelu")


def _experts(keys: Keys, activation: str | None) -> dict[str, Any]:
    """Return the ReLU-gated LLaMA that a model of one expert is; else the mixture.

    See `gguf_files.names.SMALLTHINKER`.
    """
    if keys.size("expert_count") > 1:
        return mixture_config(keys)
    check_one_expert_keys(keys.file)
    check_routers(keys.file, keys.size("block_count"), keys.size("embedding_length"))
    d_ff = keys.size("expert_feed_forward_length", keys.size("feed_forward_length"))
    said = ACTIVATION_KEY in keys.file.values
    found = activation_of(keys, activation, always=None if said else "relu", dense="relu")
    return _llama(keys, None) | {"intermediate_size": d_ff} | found


def has_experts(file: GGUFFile) -> bool:
    """Whether a file stores FFNs as experts."""
    value = file.values.get("general.architecture")
    return value is not None and text_of(value.data) == SMALLTHINKER


def _minicpm(keys: Keys, activation: str | None) -> dict[str, Any]:
    """Return MiniCPM's constants too; files from before they had keys have 12, 1.4 and 256.

    Source: llama.cpp convert_hf_to_gguf.py:MiniCPMModel, and its loader's defaults for old files.
    """
    d_model, n_layers = keys.size("embedding_length"), keys.size("block_count")
    found = _llama(keys, activation) | {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "scale_emb": keys.real("embedding_scale", 12.0),
        "scale_depth": 1.4,
        "dim_model_base": 256,
    }
    if keys.has("residual_scale"):
        found["scale_depth"] = _positive(keys, "residual_scale") * math.sqrt(n_layers)
    if keys.has("logit_scale"):
        found["dim_model_base"] = d_model / _positive(keys, "logit_scale")
    return found


def _positive(keys: Keys, key: str) -> float:
    if (found := keys.real(key)) <= 0:
        raise keys.error(f"key {keys.full(key)} is {found:g}, expected a number above 0")
    return found


def _falcon(keys: Keys, activation: str | None) -> dict[str, Any]:
    """Return the layout that the tensors show: file names do not tell Falcon's three apart."""
    n_heads = keys.size("attention.head_count")
    n_kv_heads = keys.size("attention.head_count_kv", n_heads)
    two_norms = _SECOND_NORM in keys.file.tensors
    head_dim = keys.size("embedding_length") // max(n_heads, 1)
    d_ff = keys.size("feed_forward_length", 4 * keys.size("embedding_length"))
    found = activation_of(keys, activation, dense="gelu", sparse=("relu",))
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "ffn_hidden_size": d_ff,
        "num_kv_heads": n_kv_heads,
        "new_decoder_architecture": two_norms or n_kv_heads != 1,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "layer_norm_epsilon": keys.real("attention.layer_norm_epsilon"),
        "activation": found["hidden_act"],
        **_rope(keys, head_dim),
    }


def _opt(keys: Keys, activation: str | None) -> dict[str, Any]:
    found = activation_of(keys, activation, always="relu")
    positions = _rows(keys, _POSITIONS) - POSITION_OFFSET
    if positions < 1:
        raise keys.error(f"tensor {_POSITIONS} has no rows beyond the first {POSITION_OFFSET}")
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "ffn_dim": keys.size("feed_forward_length"),
        "max_position_embeddings": positions,
        "activation_function": found["hidden_act"],
        # PowerInfer's graph has no other head, and its loader no tensor for one.
        "tie_word_embeddings": True,
    }


_FAMILIES: dict[str, Callable[[Keys, str | None], dict[str, Any]]] = {
    "llama": _llama,
    "bamboo": _bamboo,
    "minicpm": _minicpm,
    "falcon": _falcon,
    "opt": _opt,
    SMALLTHINKER: _experts,
}


def _rope(keys: Keys, head_dim: int) -> dict[str, Any]:
    """Return base and scaling in the keys, and no others, that transformers of any age reads."""
    turned = keys.size("rope.dimension_count", head_dim)
    if turned != head_dim:
        raise keys.error(
            f"key {keys.full('rope.dimension_count')} is {turned}, expected the head's {head_dim}",
            "PowerInfer turns whole heads",
        )
    prefix = keys.full("rope.scaling.")
    for key in keys.file.values:
        if key.startswith(prefix) and key.removeprefix(prefix) not in _SCALING:
            raise keys.error(f"key {key} is there", "PowerInfer has no such scaling of positions")
    theta = {"rope_theta": keys.real("rope.freq_base", 10000.0)}
    if _FREQUENCIES in keys.file.tensors and (keys.file.tensor(_FREQUENCIES) != 1).any():
        raise keys.error(
            f"tensor {_FREQUENCIES} holds factors other than 1, as of Llama 3",
            "PowerInfer has no such scaling of positions",
        )
    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 1.0))
    kind = keys.text("rope.scaling.type", "linear")
    if kind == "none" or (kind in ("linear", "yarn") and factor in (0, 1)):
        return theta
    scaling: dict[str, Any] = {"type": kind, "factor": factor}
    if kind == "yarn":
        trained = keys.size("context_length")
        original = keys.size("rope.scaling.original_context_length", trained)
        scaling["original_max_position_embeddings"] = original or trained
    return theta | {"rope_scaling": scaling}
