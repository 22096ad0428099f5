"""A PowerInfer and a llama.cpp that answer at once and write down that they were called.

They import no more than they need: a benchmark starts dozens of them.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from stand_ins import TIMINGS_FORMAT, write_program

MAIN = """
import os, sys
if '--help' in sys.argv:
    print('usage: --vram-budget' + CUDA)
    sys.exit(0)
def option(name):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else None
print('main: build = 1 (abc)', file=sys.stderr)
model, prompt = option('--model'), option('--prompt')
if prompt is None:
    sys.exit(0)
threshold = os.environ.get('LLAMA_SPARSE_PRED_THRESHOLD')
kind = 'dense' if '.dense.' in model else 'predicted' if threshold is None else 'all'
with open(LOG, 'a+') as file:
    file.seek(0)
    calls = file.read().splitlines()
    print({'kind': kind, 'prompt': prompt, 'argv': sys.argv[1:]}, file=file)
FAULT
ms = {'predicted': 100, 'all': 200, 'dense': 400}[kind] * (3 if 'longer' in prompt else 1)
count = int(option('-n')) - 1
print(prompt + TEXT, end='')
sys.stderr.write(TIMINGS.format(load_ms=50, prompt_ms=ms / 10, ms=ms * count, count=count))
""".replace("TIMINGS", repr(TIMINGS_FORMAT))
PERPLEXITY = """
import os, sys
if '--help' in sys.argv:
    print('usage: --vram-budget')
    sys.exit(0)
with open(LOG, 'a') as file:
    print({'kind': 'perplexity', 'argv': sys.argv[1:]}, file=file)
# From five on, threads overwrite each other's sums.
spoilt = int(sys.argv[sys.argv.index('--threads') + 1]) >= 5
exact = 12 if 'LLAMA_SPARSE_PRED_THRESHOLD' in os.environ else 12.06
print('Final estimate: PPL =', 2 * exact if spoilt else exact)
"""
LLAMA_BENCH = """
import sys
if '--help' in sys.argv or '--list-devices' in sys.argv:
    sys.exit(0)
if '--version' in sys.argv:
    print('version: 7 (fedcba9)')
    sys.exit(0)
with open(LOG, 'a') as file:
    print({'kind': 'llama.cpp', 'argv': sys.argv[1:]}, file=file)
def option(name):
    return int(sys.argv[sys.argv.index(name) + 1])
p, n = option('-p'), option('-n')
row = '{"n_prompt": %d, "n_gen": %d, "samples_ns": [%d], "backends": "CPU"}'
print('[' + row % (p, 0, p * 1000000) + ', ' + row % (0, n, n * 50000000) + ']')
"""


class FakePrograms:
    """Both builds and the log of their runs."""

    def __init__(self, directory: Path, *, text: str = "' text'", cuda: bool = False) -> None:
        self.powerinfer, self.llama_cpp = directory / "pi", directory / "lc"
        self.log = directory / "log"
        self._text, self._cuda = text, cuda
        self.write()
        write_program(self.powerinfer / "perplexity", self._with_log(PERPLEXITY))
        write_program(self.llama_cpp / "llama-bench", self._with_log(LLAMA_BENCH))

    def write(self, fault: str = "") -> None:
        """Write PowerInfer's main, which runs `fault` before it answers; `calls` is known there."""
        body = MAIN.replace("FAULT", fault).replace("TEXT", self._text)
        body = body.replace("CUDA", "' --n-gpu-layers'" if self._cuda else "''")
        write_program(self.powerinfer / "main", self._with_log(body))

    def _with_log(self, body: str) -> str:
        return body.replace("LOG", repr(str(self.log)))

    def calls(self, *kinds: str) -> list[dict[str, Any]]:
        """Return what ran, of some kinds only."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found = [ast.literal_eval(line) for line in lines]
        return [call for call in found if not kinds or call["kind"] in kinds]
