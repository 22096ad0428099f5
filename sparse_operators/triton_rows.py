"""Device helpers of the kernels: which rows a program owns, and which of them are active.

No pass over the whole layer comes first and nothing returns to the host: every program finds the
active rows among its own with a prefix sum, and only those rows' weights are ever addressed.
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
