"""`bench.json`: its schema, and reading one back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import OutputError
from common.files import read_json
from powerinfer_bridge.benchmark.placement import PLACED_KINDS
from powerinfer_bridge.benchmark.shape import ANYTHING, NULL, Exactly, problems

KIND, SCHEMA_VERSION = "psp.bench", 1
RESULT, SAMPLES = "bench.json", "bench.csv"

_REMEDY = "pass what 'psp bench-powerinfer' of this version wrote"
_TEXT, _NUMBER, _COUNT = (str, NULL), (float, NULL), (int, NULL)
_PAIR = Exactly(2, float)
_METRICS = {
    "activation_sparsity": float,
    "activation_recall": float,
    "precision": float,
    "predicted_sparsity": float,
    "ffn_bytes_ratio": float,
}
_SPEED = {"tokens_per_second": float, "quartiles": _PAIR, "range": _PAIR, "rounds": int}
_RATIO = {"over": str, "ratio": float, "quartiles": _PAIR}
_LAYER = {
    "layer": int,
    "rank": int,
    **_METRICS,
    "activation_share_on_gpu": _NUMBER,
    "neuron_share_on_gpu": _NUMBER,
}
_ARM = {
    "name": str,
    "title": str,
    "engine": str,
    "file": str,
    "element_type": str,
    "threads": int,
    "n_gpu_layers": _COUNT,
    "vram_budget_bytes": _COUNT,
    "threshold": _NUMBER,
    "decode": _SPEED,
    "prompt": (_SPEED, NULL),
    "speedup": (_RATIO, NULL),
    "load_seconds": _NUMBER,
    "command": [str],
    "environment": ANYTHING,
    "notes": [str],
    "device": ANYTHING,
}
SAMPLE = {
    "arm": str,
    "round": int,
    "prompt": int,
    "decode_seconds": float,
    "decode_tokens": int,
    "prompt_seconds": _NUMBER,
    "prompt_tokens": _COUNT,
    "load_seconds": _NUMBER,
    "wall_seconds": float,
    "text_sha256": _TEXT,
}
"""A row of the samples; its keys are the columns of `bench.csv`."""

_HOT = {
    "neuron_share": Exactly(101, float),
    "activation_share": Exactly(101, float),
    "gpu_neuron_share": _NUMBER,
    "gpu_activation_share": _NUMBER,
}
_ESTIMATE = {
    "hardware": str,
    "tokens_per_second": {"dense": _NUMBER, "all_neurons": _NUMBER, "predicted": _NUMBER},
}
SCHEMA = {
    "kind": str,
    "schema_version": int,
    "tool_version": str,
    "created": str,
    "model": str,
    "file": str,
    "engine": str,
    "inputs": [{"role": str, "path": str, "bytes": int, "xxh3_128": str}],
    "hardware": {
        "cpu": str,
        "cpus": int,
        "memory_bytes": int,
        "gpus": [{"name": str, "memory_bytes": int}],
    },
    "versions": {
        "psp": str,
        "python": str,
        "torch": str,
        "powerinfer": _TEXT,
        "llama_cpp": _TEXT,
    },
    "settings": ANYTHING,
    **_METRICS,
    "layers": [_LAYER],
    "ppl_dense": float,
    "ppl_sparse": float,
    "ppl_gap": float,
    "ppl_transformers": _NUMBER,
    "tokens_per_second": float,
    "tokens_per_second_dense": float,
    "speedup": float,
    "context": int,
    "text": str,
    "arms": [_ARM],
    "speedups": [{"arm": str, **_RATIO}],
    "samples": [SAMPLE],
    "continuations": {"sparse": str, "dense": str},
    "prompts": int,
    "greedy_text_same": bool,
    "placement": {
        "budget_bytes": _COUNT,
        "devices": [{"name": str, "bytes": dict.fromkeys(PLACED_KINDS, int)}],
    },
    "hot_neurons": (_HOT, NULL),
    "estimate": (_ESTIMATE, NULL),
    "warnings": [{"code": str, "text": str}],
}
"""Every key of the document and what it holds."""


def check_document(document: dict[str, Any], source: str) -> None:
    """Demand the whole schema.

    Raises:
        OutputError: of another kind or version, or the first thing that does not fit.
    """
    if document.get("kind") != KIND:
        raise OutputError(f"{source}: is no benchmark (kind {KIND!r})", _REMEDY)
    if document.get("schema_version") != SCHEMA_VERSION:
        found = document.get("schema_version")
        raise OutputError(
            f"{source}: schema_version is {found!r}, expected {SCHEMA_VERSION}", _REMEDY
        )
    problem = next(problems(document, SCHEMA), None)
    if problem is not None:
        raise OutputError(f"{source}: {problem}", _REMEDY)
    names = {arm["name"] for arm in document["arms"]}
    if len(names) != len(document["arms"]) or not {"predicted", "all_neurons"} <= names:
        raise OutputError(f"{source}: arms are {sorted(names)}", _REMEDY)


def read_bench(path: Path) -> dict[str, Any]:
    """Read a `bench.json`.

    Args:
        path: the file, or the directory that holds it.

    Raises:
        OutputError: missing, damaged, or another kind of document.
    """
    file = path / RESULT if path.is_dir() else path
    document = read_json(file, OutputError, _REMEDY)
    check_document(document, str(file))
    return document
