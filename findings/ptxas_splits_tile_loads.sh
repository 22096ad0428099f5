#!/usr/bin/env bash
# The loads of one Triton tile do not leave together: ptxas puts most of them behind the arithmetic of the first.
#
# Expected: that `tl.load` of a tile asks for all of it at once, so that a product of a few rows waits for memory once. So it is in the PTX that
# Triton writes: every load stands before the first multiplication. The assembler interleaves them. What was meant to be one round
# trip to memory is several, which is the time of a kernel that has few rows to read. Registers are not what it lacks: the kernel
# takes 50 of the 255 that it may.
# Nothing runs: the kernel is compiled for a card and its machine code is read with the disassembler that Triton brings.
#
# Seen with: triton 3.6.0, Python 3.11, sm_90 and sm_80 (CARD=80): 4 rows of 4096 float16, 4 warps, 7 of 20 loads come first.
#   With triton 3.7.0 and 3.9.0 (7 and 5 of 20), and with one row (ROWS=1, 5 of 8) alike.
# Fails with: WARPS=16: a thread has five loads, and all come first (with WARPS=8 it has ten, and five do).
set -euo pipefail
TRITON=${TRITON:-3.6.0} CARD=${CARD:-90} ROWS=${ROWS:-4} WARPS=${WARPS:-4}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "triton==$TRITON"

cat > "$work/tile.py" <<'PYTHON'
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import triton
import triton.backends.nvidia as nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

COLUMNS = 4096


@triton.jit
def dot_rows(weights, x, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    factors = tl.load(x + column).to(tl.float32)
    tile = tl.load(weights + row[:, None] * COLUMNS + column[None, :])
    tl.store(y + row, tl.sum(tile.to(tl.float32) * factors[None, :], axis=1))


def in_front(instructions, load, arithmetic):
    """Return how many loads there are, and how many stand before the first arithmetic after a load."""
    loads = [place for place, name in enumerate(instructions) if re.match(load, name)]
    first = min(
        place
        for place, name in enumerate(instructions)
        if place > loads[0] and re.match(arithmetic, name)
    )
    return len(loads), sum(place < first for place in loads)


card, rows, warps = map(int, sys.argv[1:4])
folder = Path(sys.argv[4])
kinds = {"weights": "*fp16", "x": "*fp16", "y": "*fp32", "ROWS": "constexpr", "COLUMNS": "constexpr"}
source = ASTSource(
    dot_rows,
    kinds,
    constexprs={(3,): rows, (4,): COLUMNS},
    attrs={(place,): [["tt.divisibility", 16]] for place in range(3)},
)
made = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": warps})
(folder / "kernel.cubin").write_bytes(made.asm["cubin"])
reader = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


def read(how):
    command = [reader, how, folder / "kernel.cubin"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


ptx = [re.sub(r"^\s*(@!?%p\d+\s+)?", "", line) for line in made.asm["ptx"].splitlines()]
sass = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", read("-sass"), re.M)
registers = re.findall(r"REG:(\d+)", read("-res-usage"))[0]
print(f"triton {version('triton')}, sm_{card}, {rows} rows of {COLUMNS} float16, {warps} warps, {registers} registers of 255")
for name, (loads, early) in {
    "PTX": in_front(ptx, r"ld\.global.*\.v4", r"(fma|mul)\.\S*f(32|16)"),
    "machine code": in_front(sass, r"LDG.*\.128", r"(FFMA|FMUL|HFMA2|HMUL2)"),
}.items():
    print(f"{name}: {early} of {loads} loads of 16 bytes before any arithmetic")
PYTHON

said=$("$work/venv/bin/python" "$work/tile.py" "$CARD" "$ROWS" "$WARPS" "$work")
echo "$said"
numbers() { sed -n "s/^$1: \([0-9]*\) of \([0-9]*\) loads.*/\1 \2/p" <<< "$said"; }
read -r early all <<< "$(numbers PTX)"
[[ $early == "$all" ]] || { echo "could not be tried: the PTX does not have its loads first"; exit 2; }
read -r early all <<< "$(numbers "machine code")"
(( 3 * early < 2 * all )) || { echo "no longer so: the machine code has its loads first"; exit 1; }
echo "still so: more than a third of the loads wait for arithmetic"
