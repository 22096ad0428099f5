"""The Triton kernels compiled for real cards, without one: the interpreter is laxer than that.

Each launcher is called with tensors that have no data; what it would launch is recorded and then
compiled to PTX and machine code for an A100, a 4090 and an H100.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import interpreted
import pytest
import torch
from torch import Tensor

from sparse_operators.triton_launch import Launch, Operator, default_launch

pytestmark = pytest.mark.skipif(not interpreted.NEW_TRITON, reason="needs triton 3.7 or newer")

A100, RTX4090, H100 = 80, 89, 90
PROCESSORS = 108
SHARED_BYTES = 99 * 1024
"""What a program may have on the least of them, the 4090."""

REGISTERS = 64 * 1024
"""What the programs of one multiprocessor share, on all three."""

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Compiled:
    name: str
    ptx: str
    cubin: bytes
    shared: int
    spilled: int
    registers: int

    def instructions(self) -> list[str]:
        code = dumped("-sass", self.cubin)
        return re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ )?([A-Z][\w.]*)", code)


Launched = list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    from triton.runtime.jit import JITFunction

    made: Launched = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made.append((self, grid, args, options))

    monkeypatch.setattr(JITFunction, "run", record)
    return made


def arguments(tokens: int, d_model: int, d_ff: int, dtype: torch.dtype) -> list[Tensor]:
    sizes = ((tokens, d_ff), (tokens, d_model), (d_ff, d_model), (d_ff, d_model))
    return [torch.empty(*size, dtype=dtype, device="meta") for size in sizes]


def kind(name: str, value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def compiled(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any], card: int
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    bound = dict(zip(kernel.arg_names, args, strict=False)) | options
    warps, fusion = bound.pop("num_warps"), bound.pop("enable_fp_fusion")
    limit = bound.pop("maxnreg", None)
    if "WIDEN" in bound:
        bound["WIDEN"] = False  # True for the interpreter alone
    fixed = {n: v for n, v in bound.items() if n.isupper()}
    signature = {n: "constexpr" if n in fixed else kind(n, bound[n]) for n in kernel.arg_names}
    aligned = [n for n, v in bound.items() if isinstance(v, Tensor) or v % 16 == 0]
    place = kernel.arg_names.index
    source = ASTSource(
        kernel,
        signature,
        constexprs={(place(n),): v for n, v in fixed.items()},
        attrs={(place(n),): [["tt.divisibility", 16]] for n in aligned if n not in fixed},
    )
    target = GPUTarget("cuda", card, 32)
    found = triton.compile(
        source,
        target=target,
        options={"num_warps": warps, "enable_fp_fusion": fusion, "maxnreg": limit},
    )
    return assembled(kernel.__name__, found, warps, math.prod(grid))


def assembled(name: str, found: Any, warps: int, programs: int) -> Compiled:
    cubin = found.asm["cubin"]
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", dumped("-res-usage", cubin))[0]
    return Compiled(
        name=name,
        ptx=found.asm["ptx"],
        cubin=cubin,
        shared=found.metadata.shared,
        spilled=int(stack),
        registers=int(registers) * warps * 32 * -(-programs // PROCESSORS),
    )


def dumped(option: str, cubin: bytes) -> str:
    import triton.backends.nvidia as backend

    tools = Path(backend.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run(
            [tools / "cuobjdump", option, file.name],
            env={"PATH": str(tools)},  # where it finds nvdisasm
            capture_output=True,
            text=True,
            check=True,
        ).stdout


def default(operator: Operator, rows: Tensor, x: Tensor) -> Launch:
    from sparse_operators.cuda import problem_of

    problem = problem_of(operator, rows, x.shape[1])
    return default_launch(replace(problem, processors=PROCESSORS))


def up_and_down(scores: Tensor, x: Tensor, w1: Tensor, w2t: Tensor) -> None:
    from sparse_operators import cuda

    x1 = cuda.up(scores, x, w1, launch=default("up", scores, x))
    cuda.down(x1, w2t, launch=default("down", scores, x))


def fused(scores: Tensor, x: Tensor, w1: Tensor, w2t: Tensor) -> None:
    from sparse_operators import cuda

    cuda.up_down_fused(scores, x, w1, w2t, launch=default("up_down", scores, x))


CALLS = [(up_and_down, 1), (up_and_down, 8), (fused, 1)]


@pytest.mark.parametrize(("call", "tokens"), CALLS)
@pytest.mark.parametrize(
    ("dtype", "card", "d_model", "d_ff"),
    [
        (torch.float16, A100, 4096, 11008),
        (torch.bfloat16, H100, 4096, 11008),
        (torch.float16, RTX4090, 5120, 13824),
    ],
)
def test_weights_stream_in_16_byte_loads_and_nothing_spills(
    launched: Launched,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    call: Callable[..., None],
    tokens: int,
    dtype: torch.dtype,
    card: int,
    d_model: int,
    d_ff: int,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    call(*arguments(tokens, d_model, d_ff, dtype))
    assert len(launched) == 2
    for launch in launched:
        found = compiled(*launch, card)
        assert found.spilled == 0
        assert found.shared <= SHARED_BYTES
        # All programs are on the card at once: none waits for another to end. But those of S2 do,
        # so that the last ones even out the work.
        assert found.registers <= REGISTERS or found.name == "up_one_token"
        assert load_bytes(found.ptx) == {16} or found.name == "add_partials"


def load_bytes(ptx: str) -> set[int]:
    """Widths of the loads of weights: those marked as read once, or copied to shared memory."""
    direct = re.findall(r"evict_first\S*cache_hint(?:\.v(\d))?\.b(\d+) ", ptx)
    copied = re.findall(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx)
    return {int(n or 1) * int(bits) // 8 for n, bits in direct} | {int(n, 0) for n in copied}


@pytest.mark.parametrize(
    ("call", "tokens", "dtype", "d_model", "d_ff"),
    [
        (up_and_down, 1, torch.float32, 100, 37),
        (up_and_down, 8, torch.float16, 100, 37),
        (up_and_down, 8, torch.float32, 3, 5),
        (fused, 1, torch.float16, 3, 5),
    ],
)
def test_odd_sizes_compile(
    launched: Launched,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    call: Callable[..., None],
    tokens: int,
    dtype: torch.dtype,
    d_model: int,
    d_ff: int,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    call(*arguments(tokens, d_model, d_ff, dtype))
    for launch in launched:
        assert compiled(*launch, A100).spilled == 0


def test_all_loads_of_a_group_come_before_its_arithmetic(
    launched: Launched, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    up_and_down(*arguments(1, 4096, 11008, torch.float16))
    fused(*arguments(1, 4096, 11008, torch.float16))
    kernels = {launch[0].__name__: launch for launch in launched}
    # 4 rows of 8 KiB in loads of 16 bytes by 128 lanes; fused, 4 of either weight by 512.
    for name, loads in {"up_one_token": 16, "up_down_partials": 8}.items():
        found = compiled(*kernels[name], H100).instructions()
        before = found[: found.index("FFMA")]
        assert sum(each.startswith("LDG") and ".128" in each for each in before) >= loads


def test_one_launch_each(launched: Launched) -> None:
    for tokens in (1, 2):
        up_and_down(*arguments(tokens, 64, 96, torch.float16))
    names = [kernel.__name__ for kernel, *_ in launched]
    assert names == ["up_one_token", "down_slots", "up_tokens", "down_tokens"]
