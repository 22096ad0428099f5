"""Triton kernels of S2 and S3 for 2 to 8 tokens: the rows that any of them activates.

S2, `x1 = act(scores) ⊙ (x·w1ᵀ)`, is one launch; rows and tokens meet on tensor cores.

S3, `y = x1·w2t`, is one launch, too. The grid is column tiles x splits of the rows. Every program
adds up its rows in float32 and writes one partial sum; the last program of a tile to arrive, found
by counting tickets, adds the partial sums *in the order of their splits*. So the result does not
depend on who comes last: the same bits every time, without clearing the output first and without a
second launch, which atomic addition or a separate reduction would need. (The ticket is that of
NVIDIA's threadFenceReduction sample; TEAL and PowerInfer@d3ebd7c
ggml-cuda.cu:dequantize_mul_mat_axpy_sparse add atomically.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_operators.triton_kernels import (
    compact,
    is_computed,
    listed_rows,
    load_weights,
    owned_rows,
)

DOWN_RUN = tl.constexpr(16)
"""S3 deals rows out in runs of 16: a run of float16 `x1` is one 32-byte sector, read whole."""


@triton.jit
def product(a, b, sums, WIDEN: tl.constexpr):
    """`sums + a·b` in float32, on tensor cores for 16-bit operands.

    `WIDEN` is for the interpreter alone: it multiplies the bit patterns of bfloat16 as integers
    (triton 3.9.0 runtime/interpreter.py:create_dot).
    """
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def up_tokens(
    scores_ptr,
    x_ptr,
    w1_ptr,
    x1_ptr,
    list_ptr,
    threshold,
    tokens,
    d_model,
    d_ff,
    TOKENS: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    D_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Several tokens: the union of their active rows, `GROUP` rows at a time on tensor cores."""
    program = tl.program_id(0)
    rows = owned_rows(program, tl.num_programs(0), ROWS, 1)
    t = tl.arange(0, TOKENS)
    is_token = (t < tokens)[:, None]
    inside = is_token & (rows < d_ff)[None, :]
    place = t[:, None] * d_ff + rows[None, :]
    scores = tl.load(scores_ptr + place, mask=inside, other=0.0).to(tl.float32)
    active = tl.max(is_computed(scores, threshold).to(tl.int32), axis=0) > 0
    zeros = tl.zeros([TOKENS, ROWS], dtype=x1_ptr.dtype.element_ty)
    tl.store(x1_ptr + place, zeros, mask=inside & (active == 0)[None, :])
    own_list = list_ptr + program * ROWS
    count = compact(own_list, rows, active)
    for first in range(0, count, GROUP):
        row, there = listed_rows(own_list, first, count, GROUP)
        products = tl.zeros([TOKENS, GROUP], dtype=tl.float32)
        for d_first in tl.range(0, d_model, D_BLOCK, num_stages=STAGES):
            d = d_first + tl.arange(0, D_BLOCK)
            x = tl.load(
                x_ptr + t[:, None] * d_model + d[None, :],
                mask=is_token & (d < d_model)[None, :],
                other=0.0,
            )
            w1 = tl.load(
                w1_ptr + row[None, :] * d_model + d[:, None],
                mask=there[None, :] & (d < d_model)[:, None],
                other=0.0,
                eviction_policy="evict_first",
            )
            products = product(x, w1, products, WIDEN)
        here = t[:, None] * d_ff + row[None, :]
        mask = is_token & there[None, :]
        score = tl.load(scores_ptr + here, mask=mask, other=0.0).to(tl.float32)
        # A row of the union may be inactive for this token: exactly 0 then, whatever w1 holds.
        x1 = tl.where(is_computed(score, threshold), score * products, 0.0)
        tl.store(x1_ptr + here, x1.to(x1_ptr.dtype.element_ty), mask=mask)


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
    rows = owned_rows(split, SPLITS, ROWS, DOWN_RUN)
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
        w2t = load_weights(w2t_ptr, row, there, d, d_model)
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
