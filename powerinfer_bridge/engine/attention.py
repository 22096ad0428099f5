"""Attention of the embedded engine: rotary positions, the cache, and the mixing of values."""

from __future__ import annotations

import math

import torch

from architectures.rope import RopeScaling, yarn_magnitude
from common.rounding import to_f16
from gguf_export.pwri.hyperparameters import Hyperparameters
from powerinfer_bridge.engine.arithmetic import Operators

_FAST, _SLOW = 32, 1
"""Turns within the original context between which YaRN blends, where no option sets others
(llama.cpp:llama_context_default_params)."""


class KVCache:
    """Keys and values of all layers, float16-valued: (n_kv_heads, tokens, head_dim) each."""

    def __init__(self, n_layers: int) -> None:
        """Start empty."""
        self._layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * n_layers
        self.length = 0

    def append(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new positions to a layer; returns all of its keys and values."""
        held = self._layers[layer]
        if held is not None:
            key, value = torch.cat([held[0], key], dim=1), torch.cat([held[1], value], dim=1)
        self._layers[layer] = key, value
        return key, value

    def prefix(self, length: int) -> KVCache:
        """Return a cache of the first `length` positions, which grows apart from this one."""
        other = KVCache(len(self._layers))
        other.length = length
        other._layers = [
            None if held is None else (held[0][:, :length], held[1][:, :length])
            for held in self._layers
        ]
        return other


class Rotary:
    """Rotary positions (PowerInfer@d3ebd7c ggml.c:ggml_compute_forward_rope_f32, rope_yarn)."""

    def __init__(self, hyper: Hyperparameters) -> None:
        """Compute the frequency of every pair of a head."""
        pairs = torch.arange(hyper.head_dim // 2, dtype=torch.float32)
        self._halves = hyper.graph.positions == "halves"
        self._magnitude = 1.0
        self._frequencies = torch.tensor(hyper.rope_theta) ** (pairs * (-2.0 / hyper.head_dim))
        if hyper.rope_scaling is not None:
            scaling = hyper.rope_scaling
            kept = _unscaled_share(pairs, hyper, scaling)
            self._frequencies = self._frequencies * (kept + (1 - kept) / scaling.factor)
            if scaling.kind == "yarn":
                self._magnitude = yarn_magnitude(scaling.factor)

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Turn the pairs of (heads, tokens, head_dim) by their tokens' positions."""
        angles = positions[:, None].float() * self._frequencies
        cosine, sine = angles.cos() * self._magnitude, angles.sin() * self._magnitude
        first, second = x.chunk(2, dim=-1) if self._halves else (x[..., 0::2], x[..., 1::2])
        turned = first * cosine - second * sine, first * sine + second * cosine
        return (
            torch.cat(turned, dim=-1) if self._halves else torch.stack(turned, dim=-1).flatten(-2)
        )


def _unscaled_share(
    pairs: torch.Tensor, hyper: Hyperparameters, scaling: RopeScaling
) -> torch.Tensor:
    """Return how far each pair keeps its frequency (ggml.c:ggml_rope_yarn_corr_dims)."""
    if scaling.kind == "linear":
        return torch.zeros_like(pairs)

    def pair_with(turns: int) -> float:
        over = math.log(scaling.original_context / (turns * 2 * math.pi))
        return hyper.head_dim * over / (2 * math.log(hyper.rope_theta))

    low = max(0, math.floor(pair_with(_FAST)))
    high = min(hyper.head_dim - 1, math.ceil(pair_with(_SLOW)))
    return 1 - ((pairs - low) / max(0.001, high - low)).clamp(0, 1)


class Attention:
    """Causal attention with grouped queries (PowerInfer@d3ebd7c llama.cpp:llm_build_kqv)."""

    def __init__(self, operators: Operators) -> None:
        """Prepare the rotation, if the graph has one."""
        self._operators = operators
        self._hyper = operators.hyper
        self._rotary = Rotary(self._hyper) if self._hyper.graph.rotary else None

    def __call__(
        self, layer: int, normed: torch.Tensor, positions: torch.Tensor, cache: KVCache
    ) -> torch.Tensor:
        """Return what attention adds to the residual stream, (tokens, d_model)."""
        hyper, block = self._hyper, f"blk.{layer}"
        query, key, value = self._project(block, normed)
        if self._rotary is not None:
            query, key = self._rotary(query, positions), self._rotary(key, positions)
        keys, values = cache.append(layer, to_f16(key), to_f16(value))
        group = hyper.n_heads // hyper.n_kv_heads
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = to_f16(query) @ keys.transpose(1, 2) / hyper.head_dim**0.5
        future = torch.arange(keys.shape[1])[None] > positions[:, None]
        shares = to_f16(scores.masked_fill(future, -torch.inf).softmax(-1))
        mixed = (shares @ values).transpose(0, 1).reshape(len(normed), -1)
        return self._operators.linear(f"{block}.attn_output", mixed)

    def _project(self, block: str, normed: torch.Tensor) -> list[torch.Tensor]:
        """Return queries, keys and values, (heads, tokens, head_dim) each."""
        hyper, linear = self._hyper, self._operators.linear
        counts = (hyper.n_heads, hyper.n_kv_heads, hyper.n_kv_heads)
        if hyper.graph.fused_qkv:
            sizes = [count * hyper.head_dim for count in counts]
            parts = torch.split_with_sizes(linear(f"{block}.attn_qkv", normed), sizes, dim=-1)
        else:
            parts = tuple(linear(f"{block}.attn_{part}", normed) for part in "qkv")
        return [
            part.view(len(normed), count, -1).transpose(0, 1)
            for part, count in zip(parts, counts, strict=True)
        ]
