"""A build of PowerInfer or llama.cpp: where its programs are, and why one cannot run or failed."""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Iterable
from pathlib import Path

from common.errors import EngineError
from powerinfer_bridge.programs.process import Finished, last_words

THRESHOLD_VARIABLE = "LLAMA_SPARSE_PRED_THRESHOLD"
"""Overrides a sparse file's threshold in PowerInfer's programs."""

_NUMBER = re.compile(
    r"\s*([+-]?(?:0x(?:[0-9a-f]+\.?[0-9a-f]*|\.[0-9a-f]+)(?:p[+-]?\d+)?"
    r"|(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|inf|nan))",
    re.ASCII | re.IGNORECASE,
)
"""What C's `strtod` reads at the beginning of a text."""

_PLACES = (".", "bin", "build/bin")
_FOREIGN = {
    "llama-bench": "a llama.cpp build: point --llama-cpp-bin at it",
    "main": "a PowerInfer or an old llama.cpp: point --powerinfer-bin at a PowerInfer",
}
"""By a program that tells whose build it is: what the build is, if another kind was expected."""

_BY_HAND = "run it by hand to see more"
_CAUSES: tuple[tuple[str, str], ...] = (
    (
        r"error while loading shared libraries: .*",
        "install the library or add its directory to LD_LIBRARY_PATH",
    ),
    (
        r"(?:CUDA error|cuBLAS error|cudaMalloc failed).*(?:out of memory|ALLOC_FAILED).*"
        r"|unable to allocate CUDA.*buffer.*",
        "put less on the GPU: lower --vram-budget (PowerInfer) or --n-gpu-layers (llama.cpp)",
    ),
    (
        r"(?:CUDA error|cuBLAS error).*|error loading model: CUDA is not loaded",
        "run nvidia-smi to see whether the GPU, its driver and the build fit together",
    ),
    (r"error: prompt is too long .*", "give a larger context or a shorter prompt"),
    (
        r"invalid magic characters: 'PWRI'.*",
        "llama.cpp cannot read a PowerInfer file: give it the dense one (psp export-gguf --dense)",
    ),
    (
        r"error loading model: .*|ValueError: Failed to load model from file: .*",
        "the program refuses the file: check it with psp verify or export it again",
    ),
    (
        r"GGML_ASSERT.*",
        "the engine's own check failed: check the file with psp verify, or report it there",
    ),
    (
        r"error: unknown argument: .*|error: invalid parameter.*",
        "another version was expected: build PowerInfer at d3ebd7c or a current llama.cpp",
    ),
)
"""What the engines print, most telling first, and the remedy. Sources: PowerInfer@d3ebd7c
ggml-cuda.cu:CUDA_CHECK, CUBLAS_CHECK, ggml.h:GGML_ASSERT, llama.cpp:llama_model_load,
examples/main/main.cpp, common/common.cpp:gpt_params_parse; llama.cpp@0c1e570
ggml/src/gguf.cpp, src/llama.cpp, ggml/src/ggml-cuda/ggml-cuda.cu; llama-cpp-python 0.3.36
llama_cpp/_internals.py."""
_SIGNALS = {
    signal.SIGILL: "the build is for another CPU: build it on this machine",
    signal.SIGKILL: "the system may have run out of memory: close other programs",
}


def threshold_read(text: str) -> float:
    """Return what PowerInfer makes of `LLAMA_SPARSE_PRED_THRESHOLD`, whatever it holds.

    It calls `atof`, which takes the longest number at the beginning and 0 where there is none
    (PowerInfer@d3ebd7c llama.cpp:llm_load_hparams).
    """
    match = _NUMBER.match(text)
    if match is None:
        return 0.0
    return float.fromhex(match[1]) if "x" in match[1].lower() else float(match[1])


def threshold_told(text: str) -> str:
    """Return a value of that variable as a message says it, and what PowerInfer makes of it."""
    read = threshold_read(text)
    match = _NUMBER.fullmatch(text)
    plain = match is not None and math.isfinite(read)
    return f"{read:g}" if plain else f"{text!r}, which is no number and read as {read:g}"


def build_directory(directory: Path, names: Iterable[str]) -> Path:
    """Return the usual place below a directory that holds one of the programs, or itself.

    Args:
        directory: of a build; or one of its programs.
        names: programs, one of which must be there.
    """
    if directory.is_file():
        directory = directory.parent
    places = [directory / place for place in _PLACES]
    held = (place for place in places if any((place / name).is_file() for name in names))
    return next(held, directory).resolve()


def require_executable(program: Path, remedy: str) -> None:
    """Do nothing if a file can be executed.

    Raises:
        EngineError: it cannot.
    """
    if program.is_file() and os.access(program, os.X_OK):
        return
    raise EngineError(f"{program}: no executable program{_other(program)}", remedy)


def _other(program: Path) -> str:
    """Say what a directory without the program is, if that is known."""
    for name, what in () if program.exists() else _FOREIGN.items():
        if (build_directory(program.parent, (name,)) / name).is_file():
            return f", but {what}"
    return ""


def require_success(run: Finished) -> None:
    """Do nothing if a program ended well.

    Raises:
        EngineError: it did not.
    """
    if run.code:
        said, remedy = _cause(run)
        raise EngineError(f"{run.command[0]}: {_ending(run.code)}{said}", remedy)


def _cause(run: Finished) -> tuple[str, str]:
    for pattern, remedy in _CAUSES:
        match = re.search(pattern, run.stderr)
        if match:
            return f": {match[0].strip()}", remedy
    remedies = {-number: remedy for number, remedy in _SIGNALS.items()}
    return last_words(run.stderr), remedies.get(run.code, _BY_HAND)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"was ended by {names.get(-code, f'signal {-code}')}"
