"""Triton kernels of S2, S3 and both fused: only the rows of active neurons are ever addressed.

No pass over the whole layer comes first and nothing returns to the host: every program finds the
active rows among its own with a prefix sum.

S2, `x1 = act(scores) ⊙ (x·w1ᵀ)`, is one launch. At 88 % sparsity the weights of a 7B layer take
about 5 µs to read on an A100, so a separate compaction kernel would cost a third of the work.
Masking instead of compacting (DejaVu, TEAL: FasterDecoding/TEAL kernels/sparse_gemv.py) saves the
bytes but spends the arithmetic of all rows, about 5 µs of multiply-adds on that card. The operators
published with ProSparse (Raincleared-Song/sparse_gpu_operator) give each lane 256 contiguous
bytes, which do not coalesce, and idle the warps of inactive rows.

S3, `y = x1·w2t`, is one launch, too. The grid is column tiles x splits of the rows. Every program
adds up its rows in float32 and writes one partial sum; the last program of a tile to arrive, found
by counting tickets, adds the partial sums *in the order of their splits*. So the result does not
depend on who comes last: the same bits every time, without clearing the output first and without a
second launch, which atomic addition or a separate reduction would need. (The ticket is that of
NVIDIA's threadFenceReduction sample; TEAL and PowerInfer@d3ebd7c
ggml-cuda.cu:dequantize_mul_mat_axpy_sparse add atomically.)

Fused, for one token, `x1` stays in registers and never reaches memory. A program takes whole rows:
a group of `w1` rows gives its `x1`, and the same rows of `w2t`, already on their way, are added to
the program's own partial `y`. A second kernel adds the partial `y`s in a fixed order. Against S2
then S3 this saves one compaction and costs the partial sums' traffic (programs x d_model x 4
bytes); by arithmetic the two come out about equal, so which one is faster is for `triton_tuning` to
measure on the card.
"""

from __future__ import annotations

import triton
import triton.language as tl

DOWN_RUN = tl.constexpr(16)
"""S3 deals rows out in runs of 16: a run of float16 `x1` is one 32-byte sector, read whole."""


@triton.jit
def owned_rows(program, programs, ROWS: tl.constexpr, INTERLEAVE: tl.constexpr):
    """Row numbers of one program, int32 `(ROWS,)`, dealt out round robin in runs of `INTERLEAVE`.

    Active neurons come in clusters (a reordered model has its hot ones in front). Dealing rows out
    like cards gives every program the same share of any cluster, which contiguous blocks do not.
    """
    i = tl.arange(0, ROWS)
    return (i // INTERLEAVE * programs + program) * INTERLEAVE + i % INTERLEAVE


@triton.jit
def compact(list_ptr, rows, active):
    """Write the active rows, in order, to the program's own list; returns how many they are.

    A register cannot be addressed by a computed index, so the list makes one trip through memory.
    """
    flags = active.to(tl.int32)
    tl.store(list_ptr + tl.cumsum(flags, axis=0) - 1, rows, mask=active)
    # The whole program reads what single threads wrote.
    tl.debug_barrier()
    return tl.sum(flags, axis=0)


@triton.jit
def listed_rows(list_ptr, first, count, GROUP: tl.constexpr):
    """The next `GROUP` rows of the list, int64 `(GROUP,)`, and which of them are there.

    int64, because row x d_model may pass 2³¹.
    """
    k = first + tl.arange(0, GROUP)
    there = k < count
    return tl.load(list_ptr + k, mask=there, other=0).to(tl.int64), there


@triton.jit
def load_weights(weight_ptr, row, there, d, d_model):
    """Columns `d` of the rows of a weight that are there, `(GROUP, D_BLOCK)`; each is read once."""
    return tl.load(
        weight_ptr + row[:, None] * d_model + d[None, :],
        mask=there[:, None] & (d < d_model)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )


@triton.jit
def is_computed(scores, threshold):
    """ReLU (`s > 0`, threshold 0) and FATReLU (`s >= T`) in one expression."""
    return (scores > 0) & (scores >= threshold)


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
def up_one_token(
    scores_ptr,
    x_ptr,
    w1_ptr,
    x1_ptr,
    list_ptr,
    threshold,
    d_model,
    d_ff,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    D_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One token: `GROUP` whole rows at a time against an `x` that stays in registers."""
    program = tl.program_id(0)
    rows = owned_rows(program, tl.num_programs(0), ROWS, 1)
    inside = rows < d_ff
    scores = tl.load(scores_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    d = tl.arange(0, D_BLOCK)
    x = tl.load(x_ptr + d, mask=d < d_model, other=0.0).to(tl.float32)
    active = is_computed(scores, threshold)
    zeros = tl.zeros([ROWS], dtype=x1_ptr.dtype.element_ty)
    tl.store(x1_ptr + rows, zeros, mask=inside & (active == 0))
    own_list = list_ptr + program * ROWS
    count = compact(own_list, rows, active)
    for first in tl.range(0, count, GROUP, num_stages=STAGES):
        row, there = listed_rows(own_list, first, count, GROUP)
        w1 = load_weights(w1_ptr, row, there, d, d_model)
        score = tl.load(scores_ptr + row, mask=there, other=0.0).to(tl.float32)
        x1 = score * tl.sum(w1.to(tl.float32) * x[None, :], axis=1)
        tl.store(x1_ptr + row, x1.to(x1_ptr.dtype.element_ty), mask=there)


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
    rows = owned_rows(split, SPLITS, ROWS, DOWN_RUN)
    own = tl.load(x1_ptr + rows, mask=rows < d_ff, other=0.0)
    own_list = list_ptr + (tile * SPLITS + split) * ROWS
    count = compact(own_list, rows, own != 0)
    d = tile * D_BLOCK + tl.arange(0, D_BLOCK)
    sums = tl.zeros([GROUP, D_BLOCK], dtype=tl.float32)
    for first in tl.range(0, count, GROUP, num_stages=STAGES):
        row, there = listed_rows(own_list, first, count, GROUP)
        w2t = load_weights(w2t_ptr, row, there, d, d_model)
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


@triton.jit
def up_down_partials(
    scores_ptr,
    x_ptr,
    w1_ptr,
    w2t_ptr,
    partials_ptr,
    list_ptr,
    threshold,
    d_model,
    d_ff,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    D_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each program's partial `y`, float32 `(programs, d_model)`."""
    program = tl.program_id(0)
    rows = owned_rows(program, tl.num_programs(0), ROWS, 1)
    scores = tl.load(scores_ptr + rows, mask=rows < d_ff, other=0.0).to(tl.float32)
    d = tl.arange(0, D_BLOCK)
    in_row = d < d_model
    x = tl.load(x_ptr + d, mask=in_row, other=0.0).to(tl.float32)
    own_list = list_ptr + program * ROWS
    count = compact(own_list, rows, is_computed(scores, threshold))
    y = tl.zeros([D_BLOCK], dtype=tl.float32)
    for first in tl.range(0, count, GROUP, num_stages=STAGES):
        row, there = listed_rows(own_list, first, count, GROUP)
        place = row[:, None] * d_model + d[None, :]
        mask = there[:, None] & in_row[None, :]
        w1 = tl.load(w1_ptr + place, mask=mask, other=0.0, eviction_policy="evict_first")
        w2t = tl.load(w2t_ptr + place, mask=mask, other=0.0, eviction_policy="evict_first")
        score = tl.load(scores_ptr + row, mask=there, other=0.0).to(tl.float32)
        x1 = score * tl.sum(w1.to(tl.float32) * x[None, :], axis=1)
        # Rounded as if it had been stored, so that both paths compute the same numbers.
        x1 = x1.to(w1_ptr.dtype.element_ty).to(tl.float32)
        # S3 skips x1 = 0 (an underflow, say), whatever w2t holds there.
        products = tl.where((x1 != 0)[:, None], w2t.to(tl.float32) * x1[:, None], 0.0)
        y += tl.sum(products, axis=0)
    tl.store(partials_ptr + program * d_model + d, y, mask=in_row)


@triton.jit
def add_partials(
    partials_ptr, y_ptr, partials, d_model, CHUNK: tl.constexpr, D_BLOCK: tl.constexpr
):
    """`y`, the sum of the partial `y`s in a fixed order."""
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    sums = tl.zeros([CHUNK, D_BLOCK], dtype=tl.float32)
    for first in tl.range(0, partials, CHUNK):
        k = first + tl.arange(0, CHUNK)
        sums += tl.load(
            partials_ptr + k[:, None] * d_model + d[None, :],
            mask=(k < partials)[:, None] & (d < d_model)[None, :],
            other=0.0,
        )
    y = tl.sum(sums, axis=0)
    tl.store(y_ptr + d, y.to(y_ptr.dtype.element_ty), mask=d < d_model)
