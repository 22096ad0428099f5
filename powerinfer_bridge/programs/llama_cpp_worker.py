"""Times a model in the package llama-cpp-python, or scores a text, and prints JSON; a program.

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


def score(
    package: Any,
    path: str,
    file: str,
    *,
    context: int,
    chunks: int | None,
    threads: int,
    n_gpu_layers: int,
) -> dict[str, object]:
    """Score a text in the windows of llama.cpp's llama-perplexity, which are PowerInfer's."""
    import numpy

    model = package.Llama(
        model_path=path,
        n_ctx=context,
        n_batch=context,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=n_gpu_layers,
        logits_all=True,
        verbose=False,
    )
    vocabulary = package.llama_model_get_vocab(model.model)
    begun = bool(package.llama_vocab_get_add_bos(vocabulary))
    with open(file, "rb") as text:
        ids = model.tokenize(text.read().removesuffix(b"\n"), add_bos=begun, special=False)
    first, means, total = context // 2, [], 0.0
    count = len(ids) // context
    for number in range(count if chunks is None else min(count, chunks)):
        window = ids[number * context : (number + 1) * context]
        model.reset()
        model.eval([model.token_bos(), *window[1:]] if begun else window)
        logits = numpy.array(model.scores[first : context - 1], dtype=numpy.float64)
        logits -= logits.max(-1, keepdims=True)
        likely = logits - numpy.log(numpy.exp(logits).sum(-1, keepdims=True))
        targets = window[first + 1 :]
        chosen = likely[numpy.arange(len(targets)), targets]
        means.append(-float(chosen.mean()))
        total -= float(chosen.sum())
    scored = len(means) * (context - 1 - first)
    return {"windows": means, "perplexity": float(numpy.exp(total / scored)) if scored else None}


def _seconds(package: Any, model: Any, batches: list[list[int]]) -> float:
    start = time.perf_counter()
    for batch in batches:
        model.eval(batch)
        package.llama_synchronize(model.ctx)
    return time.perf_counter() - start


def main(arguments: list[str]) -> None:
    """Print facts; with a model file and settings as JSON also a measurement, of a text a score."""
    package = importlib.import_module("llama_cpp")
    found = facts(package)
    if arguments:
        path, settings, *text = arguments
        run = score if text else measure
        found |= run(package, path, *text, **json.loads(settings))
    print(json.dumps(found))


if __name__ == "__main__":
    # The directory of a script comes first, and ours holds a module of the package's name.
    del sys.path[0]
    main(sys.argv[1:])
