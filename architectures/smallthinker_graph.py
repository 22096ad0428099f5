"""The graph of SmallThinker in torch, with modules named as the published checkpoints' tensors.

What it computes is PowerInfer/SmallThinker-4BA0.6B-Instruct's modeling_smallthinker.py. There is no
KV cache: it runs whole windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from architectures.spec import Experts, LayerAttention, ModelShape


@dataclass(frozen=True)
class Logits:
    """What the model gives: (batch, length, vocab_size)."""

    logits: torch.Tensor


@dataclass(frozen=True)
class Hidden:
    """What the head reads: (batch, length, d_model)."""

    last_hidden_state: torch.Tensor


class StoredLinear(nn.Linear):
    """A matrix that stays in its stored type, and is converted while it is used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product in the type of `x`."""
        return linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Scales to a mean square of one, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        """Make the weight."""
        super().__init__()
        self.weight, self._eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of (..., size)."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self._eps)
        return self.weight * (wide * scale).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention, with or without rotary positions and a sliding window."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        """Make the four matrices."""
        super().__init__()
        assert shape.attention is not None
        kinds: LayerAttention = shape.attention
        self._shape, self._rotary = shape, kinds.rotary[layer]
        self._window = kinds.window if kinds.windowed[layer] else None
        rows, kv_rows = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.d_model, rows, bias=False)
        self.k_proj = nn.Linear(shape.d_model, kv_rows, bias=False)
        self.v_proj = nn.Linear(shape.d_model, kv_rows, bias=False)
        self.o_proj = nn.Linear(rows, shape.d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what attention adds to the stream, for (batch, length, d_model)."""
        q, k, v = (
            part(x).unflatten(-1, (-1, self._shape.head_dim)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self._rotary:
            angles = _angles(x.shape[1], self._shape.head_dim, self._shape.rope_theta, x.device)
            q, k = _turned(q, angles), _turned(k, angles)
        limited = self._window is not None and self._window < x.shape[1]
        mask = _seen(x.shape[1], self._window or 0, x.device) if limited else None
        found = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        output: torch.Tensor = self.o_proj(found.transpose(1, 2).flatten(2))
        return output


def _angles(length: int, head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """Return (length, head_dim / 2) float32 angles by which pairs are turned."""
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    return torch.outer(torch.arange(length, device=device).float(), theta**-exponents)


def _turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn (batch, heads, length, head_dim); a pair is one number of each half of a head."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def _seen(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Return (length, length): which tokens a token sees, the last `window` up to itself."""
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    return (distance >= 0) & (distance < window)


class Expert(nn.Module):
    """One FFN, `down(relu(gate(x)) * up(x))`."""

    def __init__(self, shape: ModelShape) -> None:
        """Make the three matrices."""
        super().__init__()
        self.gate = StoredLinear(shape.d_model, shape.d_ff, bias=False)
        self.up = StoredLinear(shape.d_model, shape.d_ff, bias=False)
        self.down = StoredLinear(shape.d_ff, shape.d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output for (tokens, d_model)."""
        output: torch.Tensor = self.down(self.gate(x).relu() * self.up(x))
        return output


class Mixture(nn.Module):
    """Experts, and a router that chooses among them by another input than theirs."""

    def __init__(self, shape: ModelShape) -> None:
        """Make the router and the experts."""
        super().__init__()
        assert shape.experts is not None
        self._experts: Experts = shape.experts
        self.primary_router = nn.Linear(shape.d_model, shape.experts.count, bias=False)
        self.experts = nn.ModuleList(Expert(shape) for _ in range(shape.experts.count))

    def forward(self, routed_by: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        Args:
            routed_by: (batch, length, d_model), the stream before attention, without a norm.
            x: (batch, length, d_model), what the experts read.
        """
        chosen, weights = self.choose(routed_by.flatten(0, 1))
        rows = x.flatten(0, 1)
        output = torch.zeros_like(rows)
        for number in sorted(set(chosen.flatten().tolist())):
            token, place = torch.where(chosen == number)
            found = self.experts[number](rows[token]) * weights[token, place, None]
            output = output.index_add(0, token, found)
        return output.view_as(x)

    def choose(self, routed_by: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return numbers and weights of the chosen experts, (tokens, chosen) each.

        Weights are divided by their sum in both kinds of gating, whatever a config's
        `norm_topk_prob` says.
        """
        logits, chosen = torch.topk(self.primary_router(routed_by), self._experts.chosen, dim=-1)
        if self._experts.gating == "softmax":
            return chosen, logits.float().softmax(dim=-1).to(routed_by.dtype)
        weights = logits.sigmoid()
        return chosen, weights / weights.sum(dim=-1, keepdim=True)


class Block(nn.Module):
    """Attention and experts; the router reads what enters the block."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        """Make the parts."""
        super().__init__()
        self.input_layernorm = RMSNorm(shape.d_model, shape.norm_eps)
        self.self_attn = Attention(shape, layer)
        self.post_attention_layernorm = RMSNorm(shape.d_model, shape.norm_eps)
        self.block_sparse_moe = Mixture(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the stream after the block, for (batch, length, d_model)."""
        between: torch.Tensor = x + self.self_attn(self.input_layernorm(x))
        added: torch.Tensor = self.block_sparse_moe(x, self.post_attention_layernorm(between))
        return between + added


class Body(nn.Module):
    """The model without its head."""

    def __init__(self, shape: ModelShape) -> None:
        """Make embedding, blocks and the last norm."""
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.d_model)
        self.layers = nn.ModuleList(Block(shape, layer) for layer in range(shape.n_layers))
        self.norm = RMSNorm(shape.d_model, shape.norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        use_cache: bool = False,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Hidden:
        """Return what the head reads; nothing is cached.

        Args:
            input_ids: (batch, length) int64 token ids.
            use_cache: false.
            inputs_embeds: in the place of ids, (batch, length, d_model), what enters the blocks.
        """
        assert not use_cache
        assert (input_ids is None) is not (inputs_embeds is None)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.layers:
            x = block(x)
        return Hidden(self.norm(x))


class SmallThinker(nn.Module):
    """The causal language model, called as transformers' are."""

    def __init__(self, shape: ModelShape) -> None:
        """Make body and head; embeddings are never tied in it."""
        super().__init__()
        self.model = Body(shape)
        self.lm_head = nn.Linear(shape.d_model, shape.vocab_size, bias=False)

    @property
    def base_model(self) -> Body:
        """The model without its head."""
        return self.model

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head."""
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Logits:
        """Return logits, for (batch, length) int64 token ids."""
        return Logits(self.lm_head(self.model(input_ids, use_cache).last_hidden_state))
