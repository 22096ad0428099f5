#!/usr/bin/env bash
# On a CPU without instructions for bfloat16 the time of a product in it depends on how the second matrix lies in memory: as
# in a linear layer's forward pass (transposed) it takes a few times float32's time, as in its backward pass (not transposed)
# ten times that. Nothing is said, and `torch.autocast("cpu", torch.bfloat16)` is then far slower than no autocast.
#
# Expected: either the same factor for both, or float32's kernels with a conversion before them, which cost a few per cent
# here. A model that runs well enough forward in bfloat16 trains at a small part of float32's speed.
# ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY keep torch to AVX2, so this shows on newer x86 processors too.
#
# Seen with: torch 2.13.0+cpu, Python 3.11, x86-64 with AVX2: forward 4 to 5 times float32's time, backward 36 to 47 times.
# Fails with: the same in float32 (DTYPE=float32). Not tried: processors with AVX-512 BF16 and their own instructions
# (ISA=DEFAULT CAPABILITY=default).
set -euo pipefail
TORCH=${TORCH:-2.13.0}
DTYPE=${DTYPE:-bfloat16}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==$TORCH" "numpy==2.4.2"

cat > "$work/show.py" <<'PYTHON'
import sys
import time

import torch

ROWS, INPUTS, OUTPUTS, TIMES = 1024, 384, 1536, 5


def seconds(product) -> float:
    product()
    found = []
    for _ in range(TIMES):
        start = time.process_time()
        product()
        found.append(time.process_time() - start)
    return min(found)


torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[1])
x, weight, gradient = torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS), torch.randn(ROWS, OUTPUTS)
a, w, g = x.to(dtype), weight.to(dtype), gradient.to(dtype)
forward = seconds(lambda: a @ w.T) / seconds(lambda: x @ weight.T)
backward = seconds(lambda: g @ w) / seconds(lambda: gradient @ weight)
converted = seconds(lambda: (g.float() @ w.float()).to(dtype)) / seconds(lambda: gradient @ weight)
print(f"torch {torch.__version__}, {sys.argv[1]}: forward {forward:.1f} times float32's time, backward {backward:.1f}, "
      f"backward by way of float32 {converted:.2f}")
sys.exit(not (backward > 3 * forward > 3 and converted < 3))
PYTHON
ONEDNN_MAX_CPU_ISA=${ISA:-AVX2} ATEN_CPU_CAPABILITY=${CAPABILITY:-avx2} "$work/venv/bin/python" "$work/show.py" "$DTYPE" || {
  echo "it does not hold any more"
  exit 1
}
echo "it holds"
