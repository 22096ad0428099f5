"""Kernels of S2: `x1 = act(scores) ⊙ (x·w1ᵀ)`, reading only the active rows of `w1`.

One launch. At 88 % sparsity the weights of a 7B layer take about 5 µs to read on an A100, so a
separate compaction kernel would cost a third of the work; each program compacts its own rows.
Masking instead of compacting (DejaVu, TEAL: FasterDecoding/TEAL kernels/sparse_gemv.py) saves the
bytes but spends the arithmetic of all rows, about 5 µs of multiply-adds on that card. The operators
published with ProSparse (Raincleared-Song/sparse_gpu_operator) give each lane 256 contiguous
bytes, which do not coalesce, and idle the warps of inactive rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_operators.triton_rows import compact, is_computed, listed_rows, owned_rows, product


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
        w1 = tl.load(
            w1_ptr + row[:, None] * d_model + d[None, :],
            mask=there[:, None] & (d < d_model)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
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
