"""Triton kernels without a GPU: run by Triton's interpreter in a process of their own.

The interpreter must be asked for before anything imports triton, and then stays for good; torch's
own compiler imports triton too. So one child process, started with the variable set, takes calls.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
NEW_TRITON = HAS_TRITON and [int(n) for n in version("triton").split(".")[:2]] >= [3, 7]
"""The interpreter of triton 3.6 fails with numpy 2.4: it makes scalars of 1-element arrays."""

KERNELS = "sparse_operators.cuda"


@dataclass(frozen=True)
class Interpreter:
    """Calls functions in the child process, those of the kernels' launchers by default."""

    pool: ProcessPoolExecutor

    def __call__(self, name: str, *args: Any, module: str = KERNELS, **options: Any) -> Any:
        sent = self.pool.submit(_serve, module, name, _packed((args, options)))
        return _unpacked(sent.result(timeout=300))


@dataclass(frozen=True)
class Cuda:
    """The same calls on a real GPU."""

    def __call__(self, name: str, *args: Any, module: str = KERNELS, **options: Any) -> Any:
        moved = [a.cuda() if isinstance(a, Tensor) else a for a in args]
        result = getattr(importlib.import_module(module), name)(*moved, **options)
        return result.cpu() if isinstance(result, Tensor) else result


@cache
def start() -> Interpreter:
    """The child process that interprets; it ends with this one."""
    context = multiprocessing.get_context("spawn")
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_INTERPRET", "1")
    patch.setenv("OMP_NUM_THREADS", "1")
    try:
        pool = ProcessPoolExecutor(1, mp_context=context)
        assert pool.submit(_interprets).result(timeout=120)
    finally:
        patch.undo()
    return Interpreter(pool)


def down_in_order(x1: Tensor, w2t: Tensor, order: Sequence[int]) -> Tensor:
    """S3 in `len(order)` splits that run, and so arrive, in this order (in the child only)."""
    from triton.runtime.interpreter import interpreter_builder

    from sparse_operators.cuda import down
    from sparse_operators.triton_launch import Launch

    set_index = interpreter_builder.set_grid_idx
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            interpreter_builder, "set_grid_idx", lambda x, y, z: set_index(x, order[y], z)
        )
        return down(x1, w2t, launch=Launch(programs=len(order), group=16, columns=16, warps=1))


def down_twice(x1: Tensor, w2t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S3 in tiles twice with the same counters, and these afterwards (in the child only)."""
    from sparse_operators import cuda
    from sparse_operators.triton_launch import Launch

    counters = torch.zeros(64, dtype=torch.int32)
    launch = Launch(programs=3, group=16, columns=16, warps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "tickets", lambda device, count: counters)
        first, second = (cuda.down(x1, w2t, launch=launch) for _ in range(2))
    return first, second, counters


def up_as(scores: Tensor, x: Tensor, w1: Tensor, cut: dict[str, Any]) -> Tensor:
    """S2 with a launch given as its fields."""
    from sparse_operators.cuda import up
    from sparse_operators.triton_launch import Launch

    return up(scores, x, w1, launch=Launch(**cut))


def down_as(x1: Tensor, w2t: Tensor, cut: dict[str, Any]) -> Tensor:
    """S3 with a launch given as its fields."""
    from sparse_operators.cuda import down
    from sparse_operators.triton_launch import Launch

    return down(x1, w2t, launch=Launch(**cut))


def _interprets() -> bool:
    _save_work()
    return os.environ.get("TRITON_INTERPRET") == "1"


def _save_work() -> None:
    """Leave out what the interpreter does for nothing, more than half of its time.

    It computes whether each sum of integers overflows, and looks at the answer in debug mode alone;
    and it looks through all of triton.language at each call of a function inside a kernel, though
    the first from a module has replaced all there is to replace until the kernel ends.
    """
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[int] = set()

    def patch_once(function: Any) -> Any:
        if id(function.__globals__) in replaced:
            return None
        replaced.add(id(function.__globals__))
        return patch(function)

    def run_afresh(*args: Any, **options: Any) -> Any:
        replaced.clear()
        return run(*args, **options)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = run_afresh


def _serve(module: str, name: str, sent: bytes) -> bytes:
    args, options = _unpacked(sent)
    _poison_memory()
    return _packed(getattr(importlib.import_module(module), name)(*args, **options))


def _poison_memory() -> None:
    """Fresh buffers hold NaN, or row numbers far outside, so that what is not written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(value: bytes) -> Any:
    return torch.load(io.BytesIO(value), weights_only=True)
