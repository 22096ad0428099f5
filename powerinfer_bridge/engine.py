"""The embedded engine: computes what PowerInfer computes from an exported file.

It follows PowerInfer's CPU arithmetic (commit d3ebd7c): weights are float16, the vector that
multiplies them is rounded to float16 and sums are float32 (ggml's F16 dot product); keys, values
and attention weights are stored as float16. Only the order of summation differs. It is an oracle
and a stand-in; its speed says nothing about PowerInfer's.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch.nn.functional import linear

from common.decisions import DecisionCounts
from common.errors import EngineError
from gguf_export.reader import GGUFFile
from powerinfer_bridge.hyperparameters import read_hyperparameters
from powerinfer_bridge.vocabulary import FileVocabulary
from powerinfer_bridge.weights import Weights


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


def to_f16(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to the nearest float16 value, kept as float32."""
    return x.half().float()


class Engine:
    """A sparse LLaMA-like model loaded from a PWRI file."""

    def __init__(self, path: Path, *, threshold: float | None = None) -> None:
        """Open and check a file.

        Args:
            path: `*.powerinfer.gguf`.
            threshold: replaces the file's, as PowerInfer's environment variable
                LLAMA_SPARSE_PRED_THRESHOLD does.

        Raises:
            FormatError: the file breaks the contract.
        """
        file = GGUFFile(path)
        self.hyper = read_hyperparameters(file)
        self.vocabulary = FileVocabulary(file)
        self.weights = Weights(file, self.hyper, len(self.vocabulary.tokens))
        self.threshold = self.hyper.threshold if threshold is None else threshold
        self.counts: list[DecisionCounts] | None = None
        half = self.hyper.head_dim // 2
        exponents = torch.arange(half, dtype=torch.float32) * (-2.0 / self.hyper.head_dim)
        self._frequencies = torch.tensor(self.hyper.rope_theta) ** exponents

    def with_threshold(self, threshold: float) -> Engine:
        """Return an engine on the same weights in memory with another threshold, counting off."""
        other = copy.copy(self)
        other.threshold, other.counts = threshold, None
        return other

    def count(self) -> list[DecisionCounts]:
        """Count the truly active neurons against those computed, layer by layer, from now on.

        Costs a full gate for every token; set `counts` to None to stop.
        """
        self.counts = [DecisionCounts() for _ in range(self.hyper.n_layers)]
        return self.counts

    def rank(self, layer: int) -> int:
        """Return the rank of a layer's predictor."""
        return len(self.weights(f"blk.{layer}.fc1"))

    @torch.inference_mode()
    def forward(
        self, tokens: list[int], cache: KVCache, *, last_only: bool = False
    ) -> torch.Tensor:
        """Evaluate tokens that follow those in `cache`.

        Args:
            tokens: ids.
            cache: grows by `len(tokens)`.
            last_only: return the last position's logits only.

        Returns:
            Logits (tokens or 1, vocab_size), float32.

        Raises:
            EngineError: an id outside the vocabulary, or no token at all.
        """
        if not tokens or not all(0 <= token < len(self.vocabulary.tokens) for token in tokens):
            raise EngineError("token ids must lie within the file's vocabulary, at least one")
        x = self.weights.rows("token_embd", torch.tensor(tokens))
        positions = torch.arange(cache.length, cache.length + len(tokens))
        for layer in range(self.hyper.n_layers):
            x = x + self._attention(layer, x, positions, cache)
            x = x + self._ffn(layer, x)
        cache.length += len(tokens)
        x = self._norm("output_norm", x[-1:] if last_only else x)
        return self._matmul("output", x)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.hyper.norm_eps)
        return x * scale * self.weights(name)

    def _matmul(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(to_f16(x), self.weights(name))

    def _attention(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor, cache: KVCache
    ) -> torch.Tensor:
        hyper, block = self.hyper, f"blk.{layer}"
        x = self._norm(f"{block}.attn_norm", x)

        def heads(name: str, count: int) -> torch.Tensor:
            return self._matmul(f"{block}.{name}", x).view(len(x), count, -1).transpose(0, 1)

        query = self._rotate(heads("attn_q", hyper.n_heads), positions)
        key = self._rotate(heads("attn_k", hyper.n_kv_heads), positions)
        keys, values = cache.append(layer, to_f16(key), to_f16(heads("attn_v", hyper.n_kv_heads)))
        group = hyper.n_heads // hyper.n_kv_heads
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = to_f16(query) @ keys.transpose(1, 2) / hyper.head_dim**0.5
        future = torch.arange(keys.shape[1])[None] > positions[:, None]
        shares = to_f16(scores.masked_fill(future, -torch.inf).softmax(-1))
        mixed = (shares @ values).transpose(0, 1).reshape(len(x), -1)
        return self._matmul(f"{block}.attn_output", mixed)

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate neighbouring pairs of (heads, tokens, head_dim), ggml's RoPE mode 0."""
        angles = positions[:, None].float() * self._frequencies
        cosine, sine = angles.cos(), angles.sin()
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
        return turned.flatten(-2)

    def _ffn(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Sparse gated FFN; `x` (tokens, d_model) is the residual, which the predictor reads."""
        block = f"blk.{layer}"
        hidden = torch.relu(self._matmul(f"{block}.fc1", x))
        predicted = ~(self._matmul(f"{block}.fc2", hidden) < self.threshold)
        normed = to_f16(self._norm(f"{block}.ffn_norm", x))
        if self.counts is not None:
            self.counts[layer].add(self._active(block, normed), predicted)
        if len(x) == 1 and not predicted.all():
            return self._ffn_rows(block, normed, predicted[0].nonzero()[:, 0])
        gate = linear(normed, self.weights(f"{block}.ffn_gate"))
        up = linear(normed, self.weights(f"{block}.ffn_up"))
        product = to_f16(self._activate(gate, up) * predicted)
        return product @ self.weights(f"{block}.ffn_down_t")

    def _activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.relu(gate) * (torch.relu(up) if self.hyper.up_activated else up)

    def _active(self, block: str, normed: torch.Tensor) -> torch.Tensor:
        """Return which neurons the model's own activation lets through, (tokens, d_ff) bool."""
        gate = linear(normed, self.weights(f"{block}.ffn_gate"))
        threshold = self.hyper.activation_threshold
        active = gate >= threshold if threshold else gate > 0
        if self.hyper.up_activated:
            active &= linear(normed, self.weights(f"{block}.ffn_up")) > 0
        return active

    def _ffn_rows(self, block: str, normed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Compute the chosen neurons only, for a single token."""
        gate = linear(normed, self.weights.rows(f"{block}.ffn_gate", rows))
        up = linear(normed, self.weights.rows(f"{block}.ffn_up", rows))
        down = self.weights.rows(f"{block}.ffn_down_t", rows)
        return to_f16(self._activate(gate, up)) @ down
