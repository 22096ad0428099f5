"""Triton kernels of S2, and of S2 and S3 fused, for one token; S3 alone is in `triton_down`.

Only the rows of active neurons are ever addressed. No pass over the whole layer comes first and
nothing returns to the host: every program finds the active rows itself. Sums have one order, so
that bits repeat.

What bounds them is how soon the weights are asked for. At 88 % sparsity those of a 7B layer take
about 4 µs to read on an H100, five times the latency of its memory. So all loads of a group of rows
are written, and must be issued, before the arithmetic on any of them. Otherwise the assembler moves
loads behind it to save registers, and the group takes many latencies instead of one.

S2, `x1 = act(scores) ⊙ (x·w1ᵀ)`: a program lists the active rows among its own with a prefix sum
and takes whole rows, a group at a time. Masking instead of listing (DejaVu, TEAL:
FasterDecoding/TEAL kernels/sparse_gemv.py) saves the bytes but spends the arithmetic of all rows.
The operators published with ProSparse (Raincleared-Song/sparse_gpu_operator) give each lane 256
contiguous bytes, which do not coalesce, and idle the warps of inactive rows.

Fused, `x1` stays in registers and never reaches memory. A program takes whole rows: a group of
`w1` rows gives its `x1`, and the same rows of `w2t`, already on their way, are added to the
program's own partial `y`. A second kernel adds the partial `y`s in a fixed order. Whether that is
faster than S2 then S3 is for `triton_tuning` to measure on the card.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def row_loads(
    own_list,
    first,
    count,
    scores_ptr,
    w1_ptr,
    d_model,
    GROUP: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Ask for the next `GROUP` rows of the list, in pieces, and for their scores."""
    row, there = listed_rows(own_list, first, count, GROUP)
    weights = ()
    for piece in tl.static_range(PIECES):
        d = piece * PIECE + tl.arange(0, PIECE)
        weights += (load_weights(w1_ptr, row, there, d, d_model),)
    return row, there, tl.load(scores_ptr + row, mask=there, other=0.0), weights


@triton.jit
def store_products(
    row,
    there,
    score,
    weights,
    x_ptr,
    x1_ptr,
    d_model,
    GROUP: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Store what a group of rows gives with `x`."""
    parts = ()
    for piece in tl.static_range(PIECES):
        d = piece * PIECE + tl.arange(0, PIECE)
        parts += (tl.load(x_ptr + d, mask=d < d_model, other=0.0),)
    sums = tl.zeros([GROUP, PIECE], dtype=tl.float32)
    for piece in tl.static_range(PIECES):
        sums += weights[piece].to(tl.float32) * parts[piece].to(tl.float32)[None, :]
    x1 = score.to(tl.float32) * tl.sum(sums, axis=1)
    tl.store(x1_ptr + row, x1.to(x1_ptr.dtype.element_ty), mask=there)


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
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One token: `GROUP` whole rows at a time, the next asked for before if `AHEAD`."""
    program = tl.program_id(0)
    rows = owned_rows(program, tl.num_programs(0), ROWS, 1)
    inside = rows < d_ff
    scores = tl.load(scores_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    active = is_computed(scores, threshold)
    own = list_ptr + program * ROWS
    count = compact(own, rows, active)
    if AHEAD:
        row, there, score, weights = row_loads(
            own, 0, count, scores_ptr, w1_ptr, d_model, GROUP, PIECE, PIECES
        )
        for first in tl.range(0, count, GROUP):
            store_products(row, there, score, weights, x_ptr, x1_ptr, d_model, GROUP, PIECE, PIECES)
            row, there, score, weights = row_loads(
                own, first + GROUP, count, scores_ptr, w1_ptr, d_model, GROUP, PIECE, PIECES
            )
    else:
        for first in tl.range(0, count, GROUP):
            row, there, score, weights = row_loads(
                own, first, count, scores_ptr, w1_ptr, d_model, GROUP, PIECE, PIECES
            )
            store_products(row, there, score, weights, x_ptr, x1_ptr, d_model, GROUP, PIECE, PIECES)
    # Last, so that no weight waits for it.
    zeros = tl.zeros([ROWS], dtype=x1_ptr.dtype.element_ty)
    tl.store(x1_ptr + rows, zeros, mask=inside & (active == 0))


@triton.jit
def pair_loads(
    own_list, first, count, scores_ptr, w1_ptr, w2t_ptr, d, d_model, GROUP: tl.constexpr
):
    """Ask for the scores of the next `GROUP` rows of the list and for the rows of both weights."""
    row, there = listed_rows(own_list, first, count, GROUP)
    w1 = load_weights(w1_ptr, row, there, d, d_model)
    w2t = load_weights(w2t_ptr, row, there, d, d_model)
    return tl.load(scores_ptr + row, mask=there, other=0.0).to(tl.float32), w1, w2t


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
):
    """Each program's partial `y`, float32 `(programs, d_model)`; a group ahead is asked for."""
    program = tl.program_id(0)
    rows = owned_rows(program, tl.num_programs(0), ROWS, 1)
    scores = tl.load(scores_ptr + rows, mask=rows < d_ff, other=0.0).to(tl.float32)
    own_list = list_ptr + program * ROWS
    count = compact(own_list, rows, is_computed(scores, threshold))
    d = tl.arange(0, D_BLOCK)
    score, w1, w2t = pair_loads(own_list, 0, count, scores_ptr, w1_ptr, w2t_ptr, d, d_model, GROUP)
    x = tl.load(x_ptr + d, mask=d < d_model, other=0.0)
    y = tl.zeros([D_BLOCK], dtype=tl.float32)
    for first in tl.range(0, count, GROUP):
        x1 = score * tl.sum(w1.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
        # Rounded as if it had been stored, so that both paths compute the same numbers.
        x1 = x1.to(w1_ptr.dtype.element_ty).to(tl.float32)
        # S3 skips x1 = 0 (an underflow, say), whatever w2t holds there.
        products = tl.where((x1 != 0)[:, None], w2t.to(tl.float32) * x1[:, None], 0.0)
        y += tl.sum(products, axis=0)
        score, w1, w2t = pair_loads(
            own_list, first + GROUP, count, scores_ptr, w1_ptr, w2t_ptr, d, d_model, GROUP
        )
    tl.store(partials_ptr + program * d_model + d, y, mask=d < d_model)


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
