"""Times a model in the package llama-cpp-python and prints JSON; a program of its own.

Native code that crashes or hangs then takes no psp with it. Like llama-bench it decodes tokens
whatever the model says, after a warm-up: llama.cpp@0c1e570 tools/llama-bench/llama-bench.cpp:
test_prompt, test_gen.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any


def facts(package: Any) -> dict[str, object]:
    """Return what the package is."""
    return {
        "version": str(package.__version__),
        "gpu_offload": bool(package.llama_supports_gpu_offload()),
        "system_info": package.llama_print_system_info().decode("utf-8", "replace"),
    }


def measure(
    package: Any, path: str, *, prompt_tokens: int, count: int, threads: int, n_gpu_layers: int
) -> dict[str, object]:
    """Load a model, process a prompt and decode; return seconds."""
    start = time.perf_counter()
    model = package.Llama(
        model_path=path,
        n_ctx=prompt_tokens + count + 8,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=n_gpu_layers,
        verbose=False,
    )
    load = time.perf_counter() - start
    ids = [7919 * number % model.n_vocab() for number in range(prompt_tokens)]
    _seconds(package, model, [[1]])
    model.reset()
    prompt = _seconds(package, model, [ids]) if ids else None
    decode = _seconds(package, model, [[7907 * n % model.n_vocab()] for n in range(count)])
    return {"load_seconds": load, "prompt_seconds": prompt, "decode_seconds": decode}


def _seconds(package: Any, model: Any, batches: list[list[int]]) -> float:
    start = time.perf_counter()
    for batch in batches:
        model.eval(batch)
        package.llama_synchronize(model.ctx)
    return time.perf_counter() - start


def main(arguments: list[str]) -> None:
    """Print facts; with a model file and settings as JSON also a measurement."""
    package = importlib.import_module("llama_cpp")
    found = facts(package)
    if arguments:
        path, settings = arguments
        found |= measure(package, path, **json.loads(settings))
    print(json.dumps(found))


if __name__ == "__main__":
    # The directory of a script comes first, and ours holds a module of the package's name.
    del sys.path[0]
    main(sys.argv[1:])
