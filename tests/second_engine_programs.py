"""A build of PowerInfer's second engine that answers at once, as the real one prints."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from stand_ins import write_program

PERF = """
llama_perf_sampler_print:    sampling time =       0.50 ms /    28 runs   (    0.02 ms per token)
llama_perf_context_print:        load time =      70.00 ms
llama_perf_context_print: prompt eval time =      10.00 ms /     5 tokens (    2.00 ms per token)
llama_perf_context_print:        eval time = {ms:10.2f} ms / {count:5d} runs   (9 ms per token)
llama_perf_context_print:       total time =    1701.34 ms /    27 tokens
"""
COUNTED = "fused_sparse_moe: #examined=1600, #predicted=1600 (100.00%), #activated=80 (5.00%)"
SYSTEM = "system_info: n_threads = 1 | CPU : AVX2 = 1 | AMX_INT8 = {amx} | LLAMAFILE = 1 | "
ESTIMATE = "[1]4.0000,[2]12.5000,\nFinal estimate: PPL = 12.5000 +/- 0.25000\n"
PLANNED = "perplexity: calculating perplexity over 2 chunks, n_ctx=32, batch_size=32, n_seq=1\n"

CLI = """
import sys
if '--version' in sys.argv:
    sys.stderr.write('version: 0 (unknown)\\nbuilt with cc for x86_64-linux-gnu\\n')
    sys.exit(0)
with open(LOG, 'a') as file:
    print({'program': 'cli', 'argv': sys.argv[1:]}, file=file)
FAULT
count = int(sys.argv[sys.argv.index('-n') + 1])
sys.stderr.write(SYSTEM + '\\n' + PERF.format(ms=100.0 * (count - 1), count=max(count - 1, 1)))
print(TEXT + '\\n\\n', end='')
print(COUNTED)
"""
PERPLEXITY = """
import sys
with open(LOG, 'a') as file:
    print({'program': 'perplexity', 'argv': sys.argv[1:]}, file=file)
sys.stderr.write(PLANNED)
print(ESTIMATE)
print(COUNTED)
"""


class FakeSecondEngine:
    """Both programs and the log of their runs."""

    def __init__(
        self,
        directory: Path,
        *,
        text: str = " and more",
        amx: bool = False,
        counted: str = COUNTED,
        fault: str = "",
    ) -> None:
        self.directory, self.log = directory, directory / "log"
        named = {
            "LOG": str(self.log),
            "SYSTEM": SYSTEM.format(amx=int(amx)),
            "PERF": PERF,
            "TEXT": text,
            "COUNTED": counted,
            "PLANNED": PLANNED,
            "ESTIMATE": ESTIMATE,
        }
        head = "".join(f"{name} = {value!r}\n" for name, value in named.items())
        write_program(directory / "llama-cli", head + CLI.replace("FAULT", fault))
        write_program(directory / "llama-perplexity", head + PERPLEXITY)

    def calls(self, program: str) -> list[list[str]]:
        """Return the arguments of each run of a program."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found: list[dict[str, Any]] = [ast.literal_eval(line) for line in lines]
        return [call["argv"] for call in found if call["program"] == program]
