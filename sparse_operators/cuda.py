"""S2 and S3 on CUDA: buffers, grid and launch of the Triton kernels.

Nothing here looks at the data, waits for the device or sizes a buffer by it, so every call may be
captured in a CUDA graph. Arguments are those of `operators`, which has checked them and made them
contiguous; `launch` says how to cut an operator up, the tuned or default way if it is None.

S3 of several tokens counts the programs that have arrived (`triton_batches.last_adds_up`) with
counters that every launch finds at zero and leaves at zero. Clearing them before each launch would
be a launch of its own, a quarter of the operator's time; so the kernel clears them, and `tickets`
sees to it that no two launches that may overlap share one:

- outside a CUDA graph: a set for each stream, on which launches follow each other;
- inside one: a set for each captured launch, since the graph may be replayed on any stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import triton
from torch import Tensor

from sparse_operators.reference import rounded_threshold
from sparse_operators.triton_batches import DOWN_RUN, down_tokens, up_tokens
from sparse_operators.triton_down import down_listed, down_slots, down_tiles
from sparse_operators.triton_kernels import add_partials, up_down_partials, up_one_token
from sparse_operators.triton_launch import (
    TENSOR_CORE_ROWS,
    Launch,
    Operator,
    Problem,
    TypeName,
    launch_for,
    power_of_two,
    processors_of,
    row_lanes,
    row_pieces,
    rows_each,
    tuned_launches,
)

_CHUNK = 32
"""Partial sums of S3 that are read at a time."""

_ADDED = 256
"""Partial `y`s of the fused kernel that are read at a time."""

_REGISTERS = 1 << 16
"""What the programs of one multiprocessor share, on every card since 2012."""

_WORDS = 1 << 20
"""4 MiB of int32 a device: for 30,000 captured launches in tiles, 32 counters each for 7B."""

_compiling = ContextVar("compiling", default=False)


def up(
    scores: Tensor,
    x: Tensor,
    w1: Tensor,
    *,
    threshold: float = 0.0,
    deterministic: bool = False,
    launch: Launch | None = None,
) -> Tensor:
    """S2, `x1 (t, d_ff)`; see `operators.sparse_up`."""
    (tokens, d_ff), d_model = scores.shape, x.shape[1]
    launch = launch or _launch("up", scores, d_model, deterministic)
    x1, rows = torch.empty_like(scores), rows_each(d_ff, launch.programs)
    lists = _lists(launch.programs * rows, x.device)
    limit = rounded_threshold(threshold, scores.dtype)
    grid, common = (launch.programs,), _cut(launch, rows)
    with on_device(x.device):
        if tokens == 1:
            piece, pieces = row_pieces(d_model)
            _start(
                up_one_token, grid, scores, x, w1, x1, lists, limit, d_model, d_ff,
                PIECE=piece, PIECES=pieces, AHEAD=launch.stages > 1, **common,
            )  # fmt: skip
        else:
            _start(
                up_tokens, grid, scores, x, w1, x1, lists, limit, tokens, d_model, d_ff,
                D_BLOCK=launch.columns, STAGES=launch.stages, **_padded(x.device), **common,
            )  # fmt: skip
    return x1


def down(
    x1: Tensor, w2t: Tensor, *, deterministic: bool = False, launch: Launch | None = None
) -> Tensor:
    """S3, `y (t, d_model)`; see `operators.sparse_down`."""
    tokens, d_model = x1.shape[0], w2t.shape[1]
    launch = launch or _launch("down", x1, d_model, deterministic)
    y = x1.new_empty(tokens, d_model)
    with on_device(x1.device):
        if tokens == 1 and launch.form == "slots":
            _down_slots(x1, w2t, y, launch)
        elif tokens == 1 and launch.form == "listed":
            _down_listed(x1, w2t, y, launch)
        else:
            _down_tiles(x1, w2t, y, launch)
    return y


def _down_slots(x1: Tensor, w2t: Tensor, y: Tensor, launch: Launch) -> None:
    d_ff, d_model = w2t.shape
    programs = -(-d_model // launch.columns)
    # If some multiprocessors get two programs, both must fit, or these would run in turn.
    two = programs > processors_of(x1.device)
    limit = {"maxnreg": _REGISTERS // (2 * 32 * launch.warps)} if two else {}
    _start(
        down_slots, (programs,), x1, w2t, y, d_model, d_ff,
        SLOTS=row_lanes(launch, x1.dtype), COLUMNS=launch.columns, TURNS=launch.group,
        num_warps=launch.warps, enable_fp_fusion=True, **limit,
    )  # fmt: skip


def _down_listed(x1: Tensor, w2t: Tensor, y: Tensor, launch: Launch) -> None:
    d_ff, d_model = w2t.shape
    programs = -(-d_model // launch.columns)
    _start(
        down_listed, (programs,), x1, w2t, y, _lists(programs * d_ff, x1.device), d_model, d_ff,
        THREADS=launch.warps * 32, GROUP=launch.group, LANES=row_lanes(launch, x1.dtype),
        COLUMNS=launch.columns, num_warps=launch.warps, enable_fp_fusion=True,
    )  # fmt: skip


def _down_tiles(x1: Tensor, w2t: Tensor, y: Tensor, launch: Launch) -> None:
    tokens, (d_ff, d_model) = x1.shape[0], w2t.shape
    tiles, splits = -(-d_model // launch.columns), launch.programs
    rows = rows_each(d_ff, splits, DOWN_RUN.value)
    buffers = (
        _lists(tiles * splits * rows, x1.device),
        torch.empty(splits * tokens * d_model, dtype=torch.float32, device=x1.device),
        tickets(x1.device, tiles),
    )
    common = _cut(launch, rows) | {
        "D_BLOCK": launch.columns, "SPLITS": splits, "CHUNK": min(_CHUNK, power_of_two(splits))
    }  # fmt: skip
    if tokens == 1:
        _start(
            down_tiles, (tiles, splits), x1, w2t, y, *buffers, d_model, d_ff,
            LANES=row_lanes(launch, x1.dtype), **common,
        )  # fmt: skip
    else:
        _start(
            down_tokens, (tiles, splits), x1, w2t, y, *buffers, tokens, d_model, d_ff,
            STAGES=launch.stages, **_padded(x1.device), **common,
        )  # fmt: skip


def up_down(
    scores: Tensor,
    x: Tensor,
    w1: Tensor,
    w2t: Tensor,
    *,
    threshold: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """S2 then S3; fused for one token where `triton_tuning` measured that to be faster."""
    if not deterministic:
        launch = tuned_launches(x.device).get(problem_of("up_down", scores, x.shape[1]))
        if launch is not None:
            return up_down_fused(scores, x, w1, w2t, threshold=threshold, launch=launch)
    x1 = up(scores, x, w1, threshold=threshold, deterministic=deterministic)
    return down(x1, w2t, deterministic=deterministic)


def up_down_fused(
    scores: Tensor,
    x: Tensor,
    w1: Tensor,
    w2t: Tensor,
    *,
    threshold: float = 0.0,
    launch: Launch | None = None,
) -> Tensor:
    """S2 and S3 of one token without writing `x1`; always in the same order of sums."""
    d_ff, d_model = w1.shape
    launch = launch or _launch("up_down", scores, d_model)
    y, rows = torch.empty_like(x), rows_each(d_ff, launch.programs)
    partials = torch.empty(launch.programs * d_model, dtype=torch.float32, device=x.device)
    lists = _lists(launch.programs * rows, x.device)
    limit = rounded_threshold(threshold, scores.dtype)
    with on_device(x.device):
        _start(
            up_down_partials, (launch.programs,),
            scores, x, w1, w2t, partials, lists, limit, d_model, d_ff,
            D_BLOCK=power_of_two(d_model), **_cut(launch, rows),
        )  # fmt: skip
        _start(
            add_partials, (-(-d_model // 32),), partials, y, launch.programs, d_model,
            CHUNK=min(_ADDED, power_of_two(launch.programs)), D_BLOCK=32, num_warps=8,
            enable_fp_fusion=True,
        )  # fmt: skip
    return y


@contextmanager
def compiling_in(pool: Executor) -> Iterator[None]:
    """Operators that are called inside compile their kernels, in the pool, and run none."""
    token = _compiling.set(True)
    try:
        with triton.AsyncCompileMode(pool):
            yield
    finally:
        _compiling.reset(token)


def _start(kernel: Any, grid: tuple[int, ...], *given: object, **options: int) -> None:
    """Launch a kernel; or only compile it, inside `compiling_in`."""
    if _compiling.get():
        kernel.warmup(*given, grid=grid, **options)
    else:
        kernel[grid](*given, **options)


def problem_of(operator: Operator, rows: Tensor, d_model: int) -> Problem:
    """What the launch of a call may depend on; `rows` are its `(t, d_ff)` scores or `x1`."""
    return Problem(
        operator=operator,
        tokens=rows.shape[0],
        d_model=d_model,
        d_ff=rows.shape[1],
        dtype=cast(TypeName, str(rows.dtype).removeprefix("torch.")),
        processors=processors_of(rows.device),
    )


def _launch(operator: Operator, rows: Tensor, d_model: int, deterministic: bool = False) -> Launch:
    problem = problem_of(operator, rows, d_model)
    return launch_for(problem, rows.device, deterministic=deterministic)


def _cut(launch: Launch, rows: int) -> dict[str, int]:
    """The launch as arguments of a kernel.

    Fused multiply-adds are asked for by name: Triton 3.9 warns that their default will change.
    """
    return {
        "ROWS": rows,
        "GROUP": launch.group,
        "num_warps": launch.warps,
        "enable_fp_fusion": True,
    }


def _padded(device: torch.device) -> dict[str, int]:
    """Arguments of kernels for several tokens, on tensor cores or in the interpreter."""
    return {"TOKENS": TENSOR_CORE_ROWS, "WIDEN": device.type != "cuda"}


def _lists(size: int, device: torch.device) -> Tensor:
    """Room for every program's list of active rows."""
    return torch.empty(size, dtype=torch.int32, device=device)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass
class Arena:
    """Zeros of one device, handed out once each."""

    words: Tensor
    used: int = 0
    of_stream: dict[int, Tensor] = field(default_factory=dict)

    def take(self, count: int) -> Tensor | None:
        """The next `count` counters, or None if they are used up."""
        if self.used + count > self.words.numel():
            return None
        self.used += count
        return self.words[self.used - count : self.used]


Arenas = dict[torch.device, Arena]
_arenas: Arenas = {}


def tickets(device: torch.device, count: int, arenas: Arenas = _arenas) -> Tensor:
    """At least `count` zeroed counters, int32, that no overlapping launch uses.

    Args:
        device: CUDA device, or the CPU for the interpreter.
        count: Tiles of the launch.
        arenas: Where zeros are kept; a device's are made at its first launch outside a graph.
    """
    if device.type != "cuda":
        return _zeros(device, count)
    if not torch.cuda.is_current_stream_capturing():
        if device not in arenas:
            arenas[device] = _new_arena(device)
        return _of_stream(arenas[device], device, count)
    taken = arenas[device].take(count) if device in arenas else None
    # Without an arena, or with a used up one: correct, at the price of one more node in the graph.
    return _zeros(device, count) if taken is None else taken


def _new_arena(device: torch.device) -> Arena:
    words = _zeros(device, _WORDS)
    # Other streams will use them without waiting for this one.
    torch.cuda.synchronize(device)
    return Arena(words)


def _of_stream(arena: Arena, device: torch.device, count: int) -> Tensor:
    """The stream's counters, kept outside the arena's budget so that streams cannot use it up."""
    stream = torch.cuda.current_stream(device).cuda_stream
    if stream not in arena.of_stream or arena.of_stream[stream].numel() < count:
        # Zeroed on this very stream, hence before the launch that asks for them.
        arena.of_stream[stream] = _zeros(device, count)
    return arena.of_stream[stream]


def _zeros(device: torch.device, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
