"""What a process that runs a model takes of main memory."""

from __future__ import annotations

import torch

from architectures.checkpoint import Checkpoint
from architectures.model import block_bytes

PROCESS = 768 << 20
"""Bytes of a process that has imported what it needs."""

_FFN, _RESIDUAL, _SCORES, _LOGITS = 5, 12, 2, 5
"""Arrays that are held at once: of (tokens, d_ff) and (tokens, d_model) float32 by a block, of
(windows, heads, context, context) by its attention, of (tokens, vocab_size) float32 by the head."""


def model_memory(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    *,
    blocks: int,
    windows: int,
    context: int,
    head: bool,
) -> int:
    """Return bytes that running a model takes at most.

    Args:
        checkpoint: the model.
        dtype: type that it runs in.
        blocks: that stay in memory; 1 if they are read one after the other.
        windows: sequences that run at once.
        context: tokens of each.
        head: whether the output head is run.
    """
    shape, stored = checkpoint.shape, checkpoint.dtype
    own, read = block_bytes(checkpoint, dtype), block_bytes(checkpoint, stored)
    ends = (1 + head) * shape.vocab_size * shape.d_model * (dtype.itemsize + stored.itemsize)
    tokens = windows * context
    batch = tokens * (_FFN * shape.d_ff + _RESIDUAL * shape.d_model) * 4
    scores = _SCORES * tokens * context * shape.n_heads * dtype.itemsize
    logits = _LOGITS * tokens * shape.vocab_size * 4 if head else 0
    return PROCESS + blocks * own + read + ends + batch + scores + logits
