"""Results that no machine ever gave, in the shape of real ones, for the tests of the page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Document = dict[str, Any]
SPEEDS = {"predicted": 16.3, "all_neurons": 7.9, "dense_powerinfer": 8.4, "dense_llama_cpp": 9.1}
_GIB = 2**30
MACHINE: Document = {
    "cpu": "Imaginary CPU @ 3.00GHz",
    "cpus": 8,
    "memory_bytes": 64 * _GIB,
    "gpus": [{"name": "Imaginary GPU", "memory_bytes": 24 * _GIB}],
}


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
        "hardware": MACHINE,
        "versions": {
            "psp": "0.1.0",
            "python": "3.11.7",
            "torch": "2.13.0",
            "powerinfer": None,
            "second_engine": None,
            "llama_cpp": None,
        },
        "settings": {"threads": 8, "repeats": rounds, "generate": 128, "data": None},
        **{key: float(np.mean([layer[key] for layer in layers])) for key in keys},
        "layers": layers,
        "ppl_dense": 8.1021,
        "ppl_sparse": 8.1273,
        **{"ppl_gap": 8.1273 / 8.1021 - 1, "ppl_gap_error": 0.0011},
        "ppl_transformers": 8.1019,
        "ppl_threads": 8.1290,
        "context": 512,
        "text": "pydoc_data.topics",
        "tokens_per_second": statistics.median(rates["predicted"]),
        "tokens_per_second_dense": statistics.median(rates["all_neurons"]),
        "speedup": statistics.median(rates["predicted"]) / statistics.median(rates["all_neurons"]),
        "arms": [_arm(arm, rounds, rates[arm]) for arm in rates],
        "speedups": [_speedup(rates, arm) for arm in rates if arm != "predicted"],
        "samples": [row for arm in rates for row in _samples(arm, rates[arm])],
        "continuations": {"sparse": "Once upon a time.\n<b>", "dense": "Once upon a time."},
        "greedy_text_same": False,
        "prompts": 1,
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
    decode = _speed(statistics.median(rates), (low, high), (min(rates), max(rates)), rounds)
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
        "perplexity": None,
        "ffn_bytes_ratio": None,
        "prompt": _speed(60.0, (59.0, 61.5), (58.0, 62.0), rounds),
        "speedup": None,
        "load_seconds": 3.2,
        "command": ["bin/main", "-m", "out/model.gguf", "-n", "128", "-p", "Once upon a time"],
        "environment": {},
        "notes": [],
        "device": {},
    }


def _speed(
    median: float, quartiles: tuple[float, float], ends: tuple[float, float], rounds: int
) -> Document:
    return {
        "tokens_per_second": median,
        "quartiles": list(quartiles),
        "range": list(ends),
        "rounds": rounds,
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


_EPOCH = ("loss", "held_out_loss", "held_out_error")


def predictor_report(n_layers: int = 6) -> Document:
    """Return a report of `psp train-predictor`."""
    random = np.random.default_rng(1)
    search = [
        _search_point(
            float(read), float(0.0004 / read * (1 + 0.6 * random.random())), chosen=number == 3
        )
        for number, read in enumerate(np.geomspace(0.06, 0.4, 9))
    ]
    hot = _hot()
    shares = zip(hot["neuron_share"], hot["activation_share"], strict=True)
    layers = [_predictor_layer(layer) for layer in _layers(random, n_layers)]
    keys = [key for key in layers[0] if key not in ("layer", "rank")]
    return {
        "schema_version": 1,
        "tool_version": "0.1.0",
        "model": "Made-up-7B",
        "recipe": {"name": "psp", "epochs": 4},
        "threshold": 1.0,
        "held_out_tokens": 6500,
        "average_precision_tokens": 381,
        "predictor_type": "f16",
        "mean": {key: float(np.mean([layer[key] for layer in layers])) for key in keys},
        "layers": layers,
        "search": [*search, _search_point(0.5, None)],
        "curves": [row for layer in layers for row in _curve(layer)],
        "hot_neurons": [
            {"layer": "all", "neuron_share": neurons, "activation_share": activations}
            for neurons, activations in shares
        ],
        "epochs": [
            {"layer": layer, "epoch": epoch} | dict.fromkeys(_EPOCH, 0.5 / epoch)
            for layer in range(n_layers)
            for epoch in (1, 2)
        ],
    }


def _predictor_layer(layer: Document) -> Document:
    kept = {key: value for key, value in layer.items() if not key.endswith("on_gpu")}
    lost = 1 - layer["activation_recall"]
    return kept | {
        "average_precision": 0.8,
        "missed_importance": 0.3 * lost,
        "ffn_output_error": 0.1 * lost,
    }


def _search_point(read: float, gap: float | None, *, chosen: bool = False) -> Document:
    return {
        "price": 1.0,
        "ffn_bytes_ratio": read,
        "ppl_dense": None if gap is None else 8.0,
        "ppl_sparse": None if gap is None else 8.0 * (1 + gap),
        "ppl_gap": gap,
        "kl_divergence": gap,
        "standard_error": None if gap is None else 0.0002,
        "chosen": chosen,
    }


def _curve(layer: Document) -> list[Document]:
    exported = 1 - layer["predicted_sparsity"]
    densities = [1.0, 0.5, exported, exported / 4, 0.0]
    return [
        {
            "layer": layer["layer"],
            "chosen": density == exported,
            "threshold": 1 - density,
            "density": density,
            "recall": density**0.1,
            "missed_importance": 0.3 * (1 - density**0.1),
            "ffn_output_error": 0.1 * (1 - density**0.1),
        }
        for density in densities
    ]


def estimate() -> Document:
    """Return an estimate for another machine."""
    speeds = {"dense": 131.0, "all_neurons": 120.0, "predicted": 210.5}
    device = {
        "name": "H200",
        "bandwidth": 4.8e12,
        "memory": 141 * _GIB,
        "efficiency": {"matrix": 0.8, "rows": 0.7, "columns": 0.7},
        "layer_seconds": 1e-5,
        "dense_layer_seconds": None,
        "compute": None,
        "compute_efficiency": 1.0,
        "source": "datasheet",
    }
    link = {"bandwidth": 5e10, "efficiency": 0.8, "copy_seconds": 1e-5, "source": "datasheet"}
    layer = {"predicted": 0.2, "both": 0.1, "active": 0.11}
    placed = {
        "everything_but_ffn_fits": True,
        "kv_cache_in_vram": True,
        "neuron_share_on_gpu": 1.0,
        "activation_share_on_gpu": 1.0,
    }
    budget = {
        "bytes": 16 * _GIB,
        "powerinfer_option": "--vram-budget 16.0",
        "fits_on_card": True,
        "tokens_per_second": 210.5,
        "dense_tokens_per_second": 131.0,
        **placed,
        "best": True,
    }
    run = {"run": "a: predicted", "seconds": 0.1, "estimated_seconds": 0.11, "relative_error": 0.1}
    return {
        "kind": "psp.estimate",
        "schema_version": 1,
        "label": "estimate",
        "tool_version": "0.1.0",
        "model": "Made-up-7B",
        "file": "out/made-up.powerinfer.gguf",
        "hardware": "h200",
        "hardware_details": {
            "name": "h200",
            "cpu": device,
            "gpu": device,
            "link": link,
            "threads": None,
            "thread_seconds": 1e-4,
            "notes": ["not calibrated"],
            "byte_seconds": {"cpu": 1e-11, "gpu": 3e-13},
        },
        "context": 512,
        "position": 256.0,
        "activity": {
            "source": "--density 0.2",
            "predicted": 0.2,
            "predicted_and_active": 0.1,
            "active": 0.11,
            "layers": [layer, layer],
        },
        "assumptions": ["not calibrated"],
        "tokens_per_second": speeds,
        "speedups": {"predicted_over_dense": 1.61, "predicted_over_all_neurons": 1.75},
        "seconds": {arm: {"head": 0.001, "total": 1 / speed} for arm, speed in speeds.items()},
        "device_seconds": {arm: {"CPU": 0.0, "GPU": 0.01} for arm in speeds},
        "device_bytes": {arm: {"CPU": 0.0, "GPU": 1e9} for arm in speeds},
        "dense": {
            "bytes": 14 * _GIB,
            "kv_cache_bytes": _GIB,
            "fits_on_gpu": True,
            "n_gpu_layers": 33,
        },
        "vram_budget_bytes": 16 * _GIB,
        "placement": placed,
        "vram_budgets": [budget],
        "best_vram_budget": budget,
        "calibration": {
            "runs": [run | {"left_out": True}],
            "largest_error": 0.1,
            "largest_ratio_error": None,
            "left_out": True,
            "passed_over": 2,
        },
    }


def write(directory: Path, **documents: Document) -> Path:
    """Write documents as `NAME.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, document in documents.items():
        (directory / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return directory
