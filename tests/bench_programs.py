"""A PowerInfer and a llama.cpp that answer at once and write down that they were called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stand_ins import write_program

MAIN = """
import json, os, sys, pathlib
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
log = pathlib.Path(LOG)
calls = log.read_text().splitlines() if log.exists() else []
with log.open('a') as file:
    print(json.dumps({'kind': kind, 'prompt': prompt, 'argv': sys.argv[1:]}), file=file)
FAULT
ms = {'predicted': 100, 'all': 200, 'dense': 400}[kind] * (3 if 'longer' in prompt else 1)
count = int(option('-n')) - 1
print(prompt + TEXT, end='')
print('llama_print_timings:        load time =     50.00 ms', file=sys.stderr)
print(f'llama_print_timings: prompt eval time = {ms / 10} ms /  5 tokens', file=sys.stderr)
print(f'llama_print_timings:        eval time = {ms * count}.00 ms / {count} runs', file=sys.stderr)
"""
PERPLEXITY = """
import json, os, sys, pathlib
if '--help' in sys.argv:
    print('usage: --vram-budget')
    sys.exit(0)
with pathlib.Path(LOG).open('a') as file:
    print(json.dumps({'kind': 'perplexity', 'argv': sys.argv[1:]}), file=file)
print('Final estimate: PPL =', 12 if 'LLAMA_SPARSE_PRED_THRESHOLD' in os.environ else 12.06)
"""
LLAMA_BENCH = """
import json, sys, pathlib
if '--help' in sys.argv or '--list-devices' in sys.argv:
    sys.exit(0)
if '--version' in sys.argv:
    print('version: 7 (fedcba9)')
    sys.exit(0)
with pathlib.Path(LOG).open('a') as file:
    print(json.dumps({'kind': 'llama.cpp', 'argv': sys.argv[1:]}), file=file)
def option(name):
    return int(sys.argv[sys.argv.index(name) + 1])
p, n = option('-p'), option('-n')
print(json.dumps([
    {'n_prompt': p, 'n_gen': 0, 'samples_ns': [p * 1000000], 'backends': 'CPU'},
    {'n_prompt': 0, 'n_gen': n, 'samples_ns': [n * 50000000], 'backends': 'CPU'},
]))
"""


class FakePrograms:
    """Both builds and the log of their runs."""

    def __init__(self, directory: Path, *, text: str = "' text'", cuda: bool = False) -> None:
        self.powerinfer, self.llama_cpp = directory / "pi", directory / "lc"
        self.log = directory / "log.jsonl"
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
        found = [json.loads(line) for line in lines]
        return [call for call in found if not kinds or call["kind"] in kinds]
