"""Stand-ins for real programs: scripts that print, crash and hang on demand."""

from __future__ import annotations

import sys
from pathlib import Path

from common.errors import PspError

TIMINGS_FORMAT = """
llama_print_timings:        load time = {load_ms:10.2f} ms
llama_print_timings:      sample time =       1.50 ms /    16 runs   (    0.09 ms per token)
llama_print_timings: prompt eval time = {prompt_ms:10.2f} ms /     5 tokens (    4.00 ms per token)
llama_print_timings:        eval time = {ms:10.2f} ms / {count:5d} runs   (   20.00 ms per token)
llama_print_timings:       total time =     444.95 ms
"""
"""What PowerInfer's main prints, but for its times."""
TIMINGS = TIMINGS_FORMAT.format(load_ms=123.45, prompt_ms=20, ms=300, count=15)
MAIN = f"import sys\nprint('The text', end='')\nsys.stderr.write({TIMINGS!r})"
ESTIMATE = "print('[1]4.0,[2]12.5,\\nFinal estimate: PPL = 12.5025 +/- 0.25')"
RECORDED = Path(__file__).parent / "recorded"


def recorded_output(name: str) -> str:
    """Read what a real program printed."""
    return (RECORDED / name).read_text(encoding="utf-8")


def write_program(path: Path, body: str) -> Path:
    """Write a program in Python, whose packages it does not see; that starts it sooner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable} -IS\n{body}\n")
    path.chmod(0o755)
    return path


def build(directory: Path, main: str = MAIN, perplexity: str = ESTIMATE) -> Path:
    """Write a build's two programs."""
    write_program(directory / "main", main)
    write_program(directory / "perplexity", perplexity)
    return directory


def in_one_line(error: PspError, thing: str) -> str:
    """Check that an error names the thing and a remedy in one line."""
    message = str(error)
    assert len(message.splitlines()) == 1, repr(message)
    assert thing in message
    problem, _, remedy = message.rpartition("; ")
    assert problem, f"no remedy in {message!r}"
    assert remedy
    return message
