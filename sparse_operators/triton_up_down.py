"""Kernels of S2 and S3 fused, one token: `x1` stays in registers and never reaches memory.

A program takes whole rows: a group of `w1` rows gives its `x1`, and the same rows of `w2t`, already
on their way, are added to the program's own partial `y`. A second kernel adds the partial `y`s in
a fixed order. Against S2 then S3 this saves one compaction and costs the partial sums' traffic
(programs x d_model x 4 bytes); by arithmetic the two come out about equal, so which one is faster
is for `triton_tuning` to measure on the card.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_operators.triton_rows import compact, is_computed, listed_rows, owned_rows


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
