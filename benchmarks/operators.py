"""What the sparse FFN operators reach on this machine, as JSON: `psp bench-operators --json`.

python benchmarks/operators.py --shape 7b --device cuda
"""

from __future__ import annotations

import sys

from commands.bench_operators import bench_operators

if __name__ == "__main__":
    bench_operators([*sys.argv[1:], "--json"])
