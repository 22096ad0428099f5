"""What a collection's worker takes of a machine's memory."""

from __future__ import annotations

import torch

from architectures.checkpoint import Checkpoint
from architectures.model import block_bytes
from predictor.traces.manifest import TraceHeader

_PROCESS = 768 << 20
"""Bytes of a process that has imported what collection needs."""

_FFN, _RESIDUAL = 5, 12
"""Arrays of (tokens, d_ff) and of (tokens, d_model) that a block holds at once."""

_SCORES = 2
"""Arrays of (windows, heads, context, context)."""


def worker_memory(checkpoint: Checkpoint, header: TraceHeader, blocks: int) -> int:
    """Return bytes that recording takes at most.

    Args:
        checkpoint: the model.
        header: of the store.
        blocks: that stay in memory; 1 if they are read one after the other.
    """
    shape = checkpoint.shape
    compute: torch.dtype = getattr(torch, header.compute_dtype)
    own, stored = block_bytes(checkpoint, compute), block_bytes(checkpoint, checkpoint.dtype)
    embeddings = shape.vocab_size * shape.d_model * (compute.itemsize + checkpoint.dtype.itemsize)
    tokens = header.batch * header.context
    batch = tokens * (_FFN * shape.d_ff + _RESIDUAL * shape.d_model) * 4
    scores = _SCORES * tokens * header.context * shape.n_heads * compute.itemsize
    return _PROCESS + blocks * own + stored + embeddings + batch + scores
