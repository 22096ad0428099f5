"""Triton kernels of S3, `y = x1·w2t`, for one token, in three forms to choose from by measuring.

- *Slots*: a program takes 32 columns of all rows. So nothing has to be added up between programs.
  In return every program must find all active rows: a slot, the few lanes that read a row's
  columns, keeps which of its rows are active as bits of words in registers, and takes one after the
  other. This is the default, the fastest on an H100 of those that were measured there.
- *Listed*: the same columns; a list of all active rows is written first, every thread writing those
  of its own. Rows are then shared out evenly, and the list costs a trip through memory.
- *Tiles*: column tiles x splits of the rows; the last program of a tile adds the partial sums up
  (`triton_batches.last_adds_up`). A row's share is read in longer pieces, and the sum between
  programs costs about 2 µs on an H100. Atomic additions would not, but their order is chance.

In each of them the next loads are asked for before the last are added up; see `triton_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_operators.triton_batches import DOWN_RUN, last_adds_up
from sparse_operators.triton_kernels import compact, listed_rows, load_weights, owned_rows


@triton.jit
def lowest_bit(words):
    """The number of each word's lowest bit, and the words without it."""
    lowest = words & (0 - words)
    # The number of a single bit is its exponent as a float32; the highest bit is a negative number.
    bit = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
    return bit, words ^ lowest


@triton.jit
def active_bits(x1_ptr, start, slot, d_ff, SLOTS: tl.constexpr):
    """Which of a slot's next 32 rows are active, as 0 or 1, int32 `(SLOTS, 32)`.

    Four runs of 8 neighbours, `SLOTS` runs apart: a run of float16 is one load of 16 bytes, and a
    cluster of active neurons is shared out among many slots.
    """
    b = tl.arange(0, 32)[None, :]
    rows = start + slot[:, None] * 8 + b // 8 * (SLOTS * 8) + b % 8
    return (tl.load(x1_ptr + rows, mask=rows < d_ff, other=0.0) != 0).to(tl.int32)


@triton.jit
def as_words(bits):
    """Bits `(SLOTS, 32)` as words, int32 `(SLOTS,)`."""
    return tl.sum(bits << tl.arange(0, 32)[None, :], axis=1)


@triton.jit
def next_row(words, base, SLOTS: tl.constexpr):
    """Each slot's next active row, int64, and whether it is there; then the words that are left.

    A slot goes on to its next word when one is used up, at most one word a turn.
    """
    w0, w1, w2, w3 = words
    used_up = w0 == 0
    w0 = tl.where(used_up, w1, w0)
    w1 = tl.where(used_up, w2, w1)
    w2 = tl.where(used_up, w3, w2)
    w3 = tl.where(used_up, 0, w3)
    base += tl.where(used_up, SLOTS * 32, 0)
    bit, rest = lowest_bit(w0)
    row = base + (bit >> 3) * (SLOTS * 8) + (bit & 7)
    return row.to(tl.int64), w0 != 0, (rest, w1, w2, w3), base


@triton.jit
def idle_turns(words):
    """How many turns of `next_row` find nothing before a slot's last row, int32 `(SLOTS,)`."""
    _, w1, w2, w3 = words
    return ((w1 == 0) & ((w2 | w3) != 0)).to(tl.int32) + ((w2 == 0) & (w3 != 0)).to(tl.int32)


@triton.jit
def next_loads(words, base, x1_ptr, w2t_ptr, d, d_model, SLOTS: tl.constexpr, TURNS: tl.constexpr):
    """Ask for the columns `d` of each slot's next `TURNS` rows and for their `x1`."""
    weights = ()
    factors = ()
    for _turn in tl.static_range(TURNS):
        row, there, words, base = next_row(words, base, SLOTS)
        weights += (load_weights(w2t_ptr, row, there, d, d_model),)
        factors += (tl.load(x1_ptr + row, mask=there, other=0.0),)
    return weights, factors, words, base


@triton.jit
def down_slots(
    x1_ptr,
    w2t_ptr,
    y_ptr,
    d_model,
    d_ff,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TURNS: tl.constexpr,
):
    """A few columns a program, each slot adding up its own active rows."""
    slot = tl.arange(0, SLOTS)
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([SLOTS, COLUMNS], dtype=tl.float32)
    for start in tl.range(0, d_ff, SLOTS * 128):
        b0 = active_bits(x1_ptr, start, slot, d_ff, SLOTS)
        b1 = active_bits(x1_ptr, start + SLOTS * 32, slot, d_ff, SLOTS)
        b2 = active_bits(x1_ptr, start + SLOTS * 64, slot, d_ff, SLOTS)
        b3 = active_bits(x1_ptr, start + SLOTS * 96, slot, d_ff, SLOTS)
        words = (as_words(b0), as_words(b1), as_words(b2), as_words(b3))
        turns = tl.sum(b0 + b1 + b2 + b3, axis=1) + idle_turns(words)
        weights, factors, words, base = next_loads(
            words, start + slot * 8, x1_ptr, w2t_ptr, d, d_model, SLOTS, TURNS
        )
        for _ in tl.range(0, tl.max(turns, axis=0), TURNS):
            for turn in tl.static_range(TURNS):
                sums += weights[turn].to(tl.float32) * factors[turn].to(tl.float32)[:, None]
            weights, factors, words, base = next_loads(
                words, base, x1_ptr, w2t_ptr, d, d_model, SLOTS, TURNS
            )
    y = tl.sum(sums, axis=0)
    tl.store(y_ptr + d, y.to(y_ptr.dtype.element_ty), mask=d < d_model)


@triton.jit
def eight_flags(x1_ptr, start, thread, d_ff):
    """Which of a thread's next 8 rows are active, as 0 or 1, int32 `(THREADS, 8)`."""
    rows = start + thread[:, None] * 8 + tl.arange(0, 8)[None, :]
    return (tl.load(x1_ptr + rows, mask=rows < d_ff, other=0.0) != 0).to(tl.int32)


@triton.jit
def list_all(x1_ptr, list_ptr, d_ff, THREADS: tl.constexpr):
    """Write the list of all active rows, each thread one row of its own a turn; returns its length.

    Threads of a warp write to places apart, but few of them write at all.
    """
    thread = tl.arange(0, THREADS)
    e = tl.arange(0, 8)[None, :]
    total = 0
    for start in tl.range(0, d_ff, 32 * THREADS):
        f0 = eight_flags(x1_ptr, start, thread, d_ff)
        f1 = eight_flags(x1_ptr, start + THREADS * 8, thread, d_ff)
        f2 = eight_flags(x1_ptr, start + THREADS * 16, thread, d_ff)
        f3 = eight_flags(x1_ptr, start + THREADS * 24, thread, d_ff)
        words = tl.sum((f0 << e) + (f1 << (e + 8)) + (f2 << (e + 16)) + (f3 << (e + 24)), axis=1)
        counts = tl.sum(f0 + f1 + f2 + f3, axis=1)
        place = total + tl.cumsum(counts, axis=0) - counts
        most = tl.max(counts, axis=0)
        total += tl.sum(counts, axis=0)
        for _ in tl.range(0, most):
            bit, rest = lowest_bit(words)
            row = start + thread * 8 + (bit >> 3) * (THREADS * 8) + (bit & 7)
            tl.store(list_ptr + place, row, mask=words != 0)
            place += 1
            words = rest
    # The whole program reads what single threads wrote.
    tl.debug_barrier()
    return total


@triton.jit
def add_listed(
    own_list,
    count,
    x1_ptr,
    w2t_ptr,
    d,
    d_model,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sum over a list of rows of their columns `d`, float32 `(COLUMNS,)`."""
    sums = tl.zeros([LANES, COLUMNS], dtype=tl.float32)
    w2t, x1 = listed_loads(own_list, 0, count, x1_ptr, w2t_ptr, d, d_model, GROUP)
    for first in tl.range(0, count, GROUP):
        products = w2t.to(tl.float32) * x1.to(tl.float32)[:, None]
        sums += tl.sum(tl.reshape(products, [GROUP // LANES, LANES, COLUMNS]), axis=0)
        w2t, x1 = listed_loads(own_list, first + GROUP, count, x1_ptr, w2t_ptr, d, d_model, GROUP)
    return tl.sum(sums, axis=0)


@triton.jit
def listed_loads(own_list, first, count, x1_ptr, w2t_ptr, d, d_model, GROUP: tl.constexpr):
    """Ask for the columns `d` of the next `GROUP` rows of a list and for their `x1`."""
    row, there = listed_rows(own_list, first, count, GROUP)
    w2t = load_weights(w2t_ptr, row, there, d, d_model)
    return w2t, tl.load(x1_ptr + row, mask=there, other=0.0)


@triton.jit
def down_listed(
    x1_ptr,
    w2t_ptr,
    y_ptr,
    list_ptr,
    d_model,
    d_ff,
    THREADS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A few columns a program, of all rows of a list that it makes first."""
    own = list_ptr + tl.program_id(0).to(tl.int64) * d_ff
    count = list_all(x1_ptr, own, d_ff, THREADS)
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    y = add_listed(own, count, x1_ptr, w2t_ptr, d, d_model, GROUP, LANES, COLUMNS)
    tl.store(y_ptr + d, y.to(y_ptr.dtype.element_ty), mask=d < d_model)


@triton.jit
def down_tiles(
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
    LANES: tl.constexpr,
    D_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A tile of columns and a split of the rows a program; the last of a tile adds them up."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    rows = owned_rows(split, SPLITS, ROWS, DOWN_RUN)
    x1 = tl.load(x1_ptr + rows, mask=rows < d_ff, other=0.0)
    own = list_ptr + (tile * SPLITS + split) * ROWS
    count = compact(own, rows, x1 != 0)
    d = tile * D_BLOCK + tl.arange(0, D_BLOCK)
    sums = add_listed(own, count, x1_ptr, w2t_ptr, d, d_model, GROUP, LANES, D_BLOCK)
    tl.store(partials_ptr + split * d_model + d, sums, mask=d < d_model)
    last_adds_up(partials_ptr, tickets_ptr, y_ptr, 1, d_model, D_BLOCK, SPLITS, CHUNK)
