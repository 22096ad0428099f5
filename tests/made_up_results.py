"""Results that no machine ever gave, in the shape of real ones, for the tests of the page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Document = dict[str, Any]
SPEEDS = {
    "predicted": 16.3,
    "all_neurons": 7.9,
    "dense_powerinfer": 8.4,
    "dense_llama_cpp": 9.1,
}
_GIB = 2**30


def bench(
    speeds: Mapping[str, float] = SPEEDS, *, seed: int = 0, n_layers: int = 32, rounds: int = 9
) -> Document:
    """Return a benchmark with every optional part."""
    random = np.random.default_rng(seed)
    rates = {arm: _rates(random, rate, rounds) for arm, rate in (SPEEDS | dict(speeds)).items()}
    layers = _layers(random, n_layers)
    keys = [key for key, value in layers[0].items() if isinstance(value, float)]
    return {
        "kind": "psp.bench",
        "schema_version": 1,
        "tool_version": "0.1.0",
        "created": "2026-11-24T18:00:00Z",
        "model": "Made-up-7B",
        "file": "out/made-up.powerinfer.gguf",
        "engine": "PowerInfer",
        "inputs": [
            {"role": role, "path": f"out/{role}.gguf", "bytes": 15 * _GIB, "xxh3_128": "9f" * 16}
            for role in ("model", "llama_cpp_model")
        ],
        "hardware": {
            "cpu": "Imaginary CPU @ 3.00GHz",
            "cpus": 8,
            "memory_bytes": 64 * _GIB,
            "gpus": [{"name": "Imaginary GPU", "memory_bytes": 24 * _GIB}],
        },
        "versions": {"psp": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "powerinfer": None},
        "settings": {"threads": 8, "repeats": rounds, "generate": 128, "data": None},
        **{key: float(np.mean([layer[key] for layer in layers])) for key in keys},
        "layers": layers,
        "ppl_dense": 8.1021,
        "ppl_sparse": 8.1273,
        "ppl_gap": 8.1273 / 8.1021 - 1,
        "ppl_transformers": 8.1019,
        "tokens_per_second": statistics.median(rates["predicted"]),
        "tokens_per_second_dense": statistics.median(rates["all_neurons"]),
        "speedup": statistics.median(rates["predicted"]) / statistics.median(rates["all_neurons"]),
        "context": 512,
        "text": "pydoc_data.topics",
        "arms": [_arm(arm, rounds, rates[arm]) for arm in rates],
        "speedups": [_speedup(rates, arm) for arm in rates if arm != "predicted"],
        "samples": [row for arm in rates for row in _samples(arm, rates[arm])],
        "continuations": {"sparse": "Once upon a time.\n<b>", "dense": "Once upon a time."},
        "prompts": 1,
        "greedy_text_same": False,
        "placement": {"budget_bytes": 6 * _GIB, "devices": _devices()},
        "hot_neurons": _hot() | {"gpu_neuron_share": 0.21, "gpu_activation_share": 0.793},
        "estimate": {
            "hardware": "rtx4090+ddr5",
            "tokens_per_second": {"dense": 9.9, "all_neurons": 8.2, "predicted": 18.4},
        },
        "warnings": [
            {
                "code": "cpu-dense-against-hybrid",
                "text": "dense llama.cpp ran on the CPU alone while the predicted model had a GPU: "
                "pass --ngl 99 for a fair comparison",
            }
        ],
    }


def _rates(random: np.random.Generator, rate: float, rounds: int) -> list[float]:
    return [float(rate * (1 + 0.02 * random.standard_normal())) for _ in range(rounds)]


def _layers(random: np.random.Generator, count: int) -> list[Document]:
    layers = []
    for number in range(count):
        active = 0.06 + 0.09 * np.exp(-number / 3) + 0.05 * number / count
        recall, precision = 0.93 + 0.04 * random.random(), 0.5 + 0.1 * random.random()
        density = active * recall / precision
        layers.append(
            {
                "layer": number,
                "rank": 512,
                "activation_sparsity": float(1 - active),
                "activation_recall": float(recall),
                "precision": float(precision),
                "predicted_sparsity": float(1 - density),
                "ffn_bytes_ratio": float(density + 0.06),
                "activation_share_on_gpu": None,
                "neuron_share_on_gpu": None,
            }
        )
    return layers


def _arm(name: str, rounds: int, rates: list[float]) -> Document:
    low, high = (float(value) for value in np.quantile(rates, (0.25, 0.75)))
    decode = {"quartiles": [low, high], "range": [min(rates), max(rates)], "rounds": rounds}
    decode["tokens_per_second"] = statistics.median(rates)
    prompt = {"tokens_per_second": 60.0, "quartiles": [59.0, 61.5], "rounds": rounds}
    return {
        "name": name,
        "title": name.replace("_", " "),
        "engine": "llama.cpp" if name == "dense_llama_cpp" else "PowerInfer",
        "file": "out/model.gguf",
        "element_type": "F16",
        "threads": 8,
        "n_gpu_layers": 0 if name == "dense_llama_cpp" else None,
        "vram_budget_bytes": None,
        "threshold": -1e30 if name == "all_neurons" else None,
        "decode": decode,
        "prompt": prompt | {"range": [58.0, 62.0]},
        "speedup": None,
        "load_seconds": 3.2,
        "command": ["bin/main", "-m", "out/model.gguf", "-n", "128", "-p", "Once upon a time"],
        "environment": {},
        "notes": [],
        "device": {},
    }


def _speedup(rates: dict[str, list[float]], over: str) -> Document:
    ours, theirs = rates["predicted"], rates[over]
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, high = (float(value) for value in np.quantile(ratios, (0.25, 0.75)))
    ratio = statistics.median(ours) / statistics.median(theirs)
    return {"arm": "predicted", "over": over, "ratio": ratio, "quartiles": [low, high]}


def _samples(arm: str, rates: list[float]) -> list[Document]:
    return [
        {
            "arm": arm,
            "round": number,
            "prompt": 0,
            "decode_seconds": 128 / rate,
            "decode_tokens": 128,
            "prompt_seconds": 12 / (60 + number / 9),
            "prompt_tokens": 12,
            "load_seconds": 3.2,
            "wall_seconds": 12.0,
            "text_sha256": None,
        }
        for number, rate in enumerate(rates, 1)
    ]


def _devices() -> list[Document]:
    gpu = {"embedding": 0, "attention": 2.0, "predictors": 0.92, "norms": 0.01, "output": 0.25}
    cpu = {"embedding": 0.25, "attention": 0, "predictors": 0, "norms": 0, "output": 0}
    gpu |= {"kv_cache": 0.5, "ffn_neurons": 1.7}
    cpu |= {"kv_cache": 0, "ffn_neurons": 6.4}
    return [
        {"name": name, "bytes": {part: int(size * _GIB) for part, size in parts.items()}}
        for name, parts in (("GPU", gpu), ("CPU", cpu))
    ]


def _hot() -> Document:
    neurons = np.linspace(0, 1, 101)
    captured = (1 - np.exp(-7 * neurons)) / (1 - np.exp(-7))
    return {"neuron_share": neurons.tolist(), "activation_share": captured.tolist()}


def predictor_report(n_layers: int = 6) -> Document:
    """Return a report of `psp train-predictor`."""
    random = np.random.default_rng(1)
    search = [
        {
            "ffn_bytes_ratio": float(read),
            "ppl_gap": float(0.0004 / read * (1 + 0.6 * random.random())),
            "price": 1.0,
            "chosen": number == 3,
        }
        for number, read in enumerate(np.geomspace(0.06, 0.4, 9))
    ]
    hot = _hot()
    shares = zip(hot["neuron_share"], hot["activation_share"], strict=True)
    return {
        "schema_version": 1,
        "tool_version": "0.1.0",
        "model": "Made-up-7B",
        "recipe": {"name": "psp", "epochs": 4},
        "threshold": 1.0,
        "mean": {},
        "layers": _layers(random, n_layers),
        "search": [*search, {"ffn_bytes_ratio": 0.5, "ppl_gap": None, "chosen": False}],
        "curves": [],
        "hot_neurons": [
            {"layer": "all", "neuron_share": neurons, "activation_share": activations}
            for neurons, activations in shares
        ],
    }


def estimate() -> Document:
    """Return an estimate for another machine."""
    return {
        "kind": "psp.estimate",
        "schema_version": 1,
        "label": "estimate",
        "hardware": "h200",
        "tokens_per_second": {"dense": 131.0, "all_neurons": 120.0, "predicted": 210.5},
    }


def density() -> Document:
    """Return a sweep over densities on random weights."""
    shape = {"n_layers": 4, "d_model": 4096, "d_ff": 11008, "rank": 512}
    return {
        "kind": "psp.density",
        "schema_version": 1,
        "shape": shape,
        "hardware": None,
        "threads": 2,
        "points": [_density_point(share) for share in (0.05, 0.1, 0.2, 0.5, 1.0)],
    }


def _density_point(share: float) -> Document:
    speeds = {"predicted": 20 / (0.5 + share), "all_neurons": 12.5, "dense": 14.0}
    measured = {
        arm: {"tokens_per_second": rate, "quartiles": [0.98 * rate, 1.03 * rate]}
        for arm, rate in speeds.items()
    }
    estimate = {arm: 1.1 * rate for arm, rate in speeds.items()}
    return {"density": share, **measured, "estimate": estimate}


def write(directory: Path, **documents: Document) -> Path:
    """Write documents as `NAME.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, document in documents.items():
        (directory / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return directory
