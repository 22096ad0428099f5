"""Kernels of S3: `y = x1·w2t`, reading only the rows of `w2t` where some token's `x1` is not 0.

One launch. The grid is column tiles x splits of the rows. Every program adds up its rows in
float32 and writes one partial sum; the last program of a tile to arrive, found by counting tickets,
adds the partial sums *in the order of their splits*. So the result does not depend on who comes
last: the same bits every time, without clearing the output first and without a second launch, which
atomic addition or a separate reduction would need. (The ticket is that of NVIDIA's
threadFenceReduction sample; TEAL and PowerInfer@d3ebd7c
ggml-cuda.cu:dequantize_mul_mat_axpy_sparse add atomically.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_operators.triton_rows import compact, listed_rows, owned_rows, product

INTERLEAVE = tl.constexpr(16)
"""Rows are dealt out in runs of 16: a run of float16 `x1` is one 32-byte sector, read whole."""


@triton.jit
def last_adds_up(
    partials_ptr,
    tickets_ptr,
    y_ptr,
    tokens,
    d_model,
    D_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Take a ticket; whoever draws a tile's last one adds the partial sums and hands it back."""
    tile = tl.program_id(0)
    # All threads' partial sums are written before one thread releases them with the ticket.
    tl.debug_barrier()
    ticket = tl.atomic_add(tickets_ptr + tile, 1, sem="acq_rel", scope="gpu")
    if ticket == SPLITS - 1:
        d = tile * D_BLOCK + tl.arange(0, D_BLOCK)
        for t in range(0, tokens):
            total = tl.zeros([D_BLOCK], dtype=tl.float32)
            for first in tl.static_range(0, SPLITS, CHUNK):
                split = first + tl.arange(0, CHUNK)
                part = tl.load(
                    partials_ptr + (split * tokens + t)[:, None] * d_model + d[None, :],
                    mask=(split < SPLITS)[:, None] & (d < d_model)[None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
                total += tl.sum(part, axis=0)
            tl.store(y_ptr + t * d_model + d, total.to(y_ptr.dtype.element_ty), mask=d < d_model)
        # Zero again for the next launch on this stream.
        tl.store(tickets_ptr + tile, 0)


@triton.jit
def down_one_token(
    x1_ptr,
    w2t_ptr,
    y_ptr,
    list_ptr,
    partials_ptr,
    tickets_ptr,
    d_model,
    d_ff,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    D_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One token: `GROUP` row segments at a time, added up in registers."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    rows = owned_rows(split, SPLITS, ROWS, INTERLEAVE)
    own = tl.load(x1_ptr + rows, mask=rows < d_ff, other=0.0)
    own_list = list_ptr + (tile * SPLITS + split) * ROWS
    count = compact(own_list, rows, own != 0)
    d = tile * D_BLOCK + tl.arange(0, D_BLOCK)
    sums = tl.zeros([GROUP, D_BLOCK], dtype=tl.float32)
    for first in tl.range(0, count, GROUP, num_stages=STAGES):
        row, there = listed_rows(own_list, first, count, GROUP)
        w2t = tl.load(
            w2t_ptr + row[:, None] * d_model + d[None, :],
            mask=there[:, None] & (d < d_model)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        x1 = tl.load(x1_ptr + row, mask=there, other=0.0).to(tl.float32)
        sums += w2t.to(tl.float32) * x1[:, None]
    tl.store(partials_ptr + split * d_model + d, tl.sum(sums, axis=0), mask=d < d_model)
    last_adds_up(partials_ptr, tickets_ptr, y_ptr, 1, d_model, D_BLOCK, SPLITS, CHUNK)


@triton.jit
def down_tokens(
    x1_ptr,
    w2t_ptr,
    y_ptr,
    list_ptr,
    partials_ptr,
    tickets_ptr,
    tokens,
    d_model,
    d_ff,
    TOKENS: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    D_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Several tokens: the union of their active rows, on tensor cores."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    rows = owned_rows(split, SPLITS, ROWS, INTERLEAVE)
    t = tl.arange(0, TOKENS)
    is_token = (t < tokens)[:, None]
    own = tl.load(
        x1_ptr + t[:, None] * d_ff + rows[None, :],
        mask=is_token & (rows < d_ff)[None, :],
        other=0.0,
    )
    own_list = list_ptr + (tile * SPLITS + split) * ROWS
    count = compact(own_list, rows, tl.max((own != 0).to(tl.int32), axis=0) > 0)
    d = tile * D_BLOCK + tl.arange(0, D_BLOCK)
    sums = tl.zeros([TOKENS, D_BLOCK], dtype=tl.float32)
    for first in tl.range(0, count, GROUP, num_stages=STAGES):
        row, there = listed_rows(own_list, first, count, GROUP)
        w2t = tl.load(
            w2t_ptr + row[:, None] * d_model + d[None, :],
            mask=there[:, None] & (d < d_model)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        x1 = tl.load(
            x1_ptr + t[:, None] * d_ff + row[None, :], mask=is_token & there[None, :], other=0.0
        )
        sums = product(x1, w2t, sums, WIDEN)
    tl.store(
        partials_ptr + (split * tokens + t)[:, None] * d_model + d[None, :],
        sums,
        mask=is_token & (d < d_model)[None, :],
    )
    last_adds_up(partials_ptr, tickets_ptr, y_ptr, tokens, d_model, D_BLOCK, SPLITS, CHUNK)
