#!/usr/bin/env bash
# Triton 3.6's interpreter cannot run a loop whose end is an argument of the kernel, once numpy is 2.4 or newer.
#
# Expected: that TRITON_INTERPRET=1 runs every kernel on the CPU, whichever numpy there is; Triton does not require one at all. An integer
# argument is an array of one element there, and `range` asks it for a Python number, which numpy 2.4 refuses to arrays that are not
# of 0 dimensions (before, it warned that it would). Loops up to a `tl.constexpr` and everything else run, so most kernels do.
# PyTorch 2.11, whose Triton this is, sets no limit to numpy either.
#
# Seen with: triton 3.6.0, numpy 2.4.6, torch 2.13.0 (2.11.0 with numpy 2.5.5 too), Python 3.11 and 3.12.
# Fails with: NUMPY=2.3.5, or TRITON=3.7.0: the loop adds up to 45.
set -euo pipefail
TRITON=${TRITON:-3.6.0} NUMPY=${NUMPY:-2.4.6} TORCH=2.13.0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==$TORCH" "numpy==$NUMPY"
# Torch's CUDA builds bring a Triton of their own, which gives way to this one.
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "triton==$TRITON"

cat > "$work/loops.py" <<'PYTHON'
from importlib.metadata import version

import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def to_argument(x, total, n):
    added = 0.0
    for place in range(0, n):
        added += tl.load(x + place)
    tl.store(total, added)


@triton.jit
def to_constant(x, total, n: tl.constexpr):
    added = 0.0
    for place in range(0, n):
        added += tl.load(x + place)
    tl.store(total, added)


print(*(f"{name} {version(name)}" for name in ("triton", "numpy", "torch")))
for kernel in (to_constant, to_argument):
    total = torch.zeros(1)
    try:
        kernel[(1,)](torch.arange(10.0), total, 10)
        said = f"{float(total)}"
    except (InterpreterError, TypeError) as error:
        said = f"{type(error).__name__}: {error}"
    print(f"{kernel.fn.__name__}: {said}")
PYTHON

said=$(TRITON_INTERPRET=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" "$work/loops.py")
echo "$said"
[[ $said == *"to_constant: 45.0"* ]] || { echo "could not be tried: the other loop does not run either"; exit 2; }
[[ $said == *"to_argument: InterpreterError: TypeError('only 0-dimensional arrays can be converted to Python scalars')"* ]] ||
    { echo "no longer so: the loop to an argument runs, or fails in another way"; exit 1; }
echo "still so: the loop to a constant runs, the loop to an argument does not"
