"""S2, S3 and the FFN made of them against dense products, and against what memory allows."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from math import isclose, isfinite
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from common.machine import cpu_name, read_gpus
from common.table import table
from common.typed_json import plain
from common.version import package_version
from sparse_operators import reference
from sparse_operators.operators import sparse_down, sparse_up, sparse_up_down
from sparse_operators.settings import OperatorBenchConfig
from sparse_operators.timing import (
    Operation,
    Samples,
    cache_bytes,
    gpu_seconds,
    quartiles,
    stream,
    time_calls,
    time_graphs,
    wall_seconds,
)
from sparse_operators.workload import RUNS, Inputs, Workload, draw_slots, draw_weights, workload

_TURN, _DEFAULTS = 11, 5
"""Matrices that a turn's operations read, and those of the default launches beside them."""

_HEADER = (
    "sparsity",
    "S2 dense µs",
    "S2 µs",
    "speedup",
    "S3 dense µs",
    "S3 µs",
    "speedup",
    "FFN speedup",
    "S2 GB/s",
    "S3 GB/s",
    "read GB/s",
    "× bound",
)


@torch.inference_mode()
def bench_operators(config: OperatorBenchConfig) -> dict[str, Any]:
    """Measure every sparsity, dense and sparse by turns, and judge by medians.

    Returns:
        The document that `psp bench-operators --json` prints; times in seconds.

    Raises:
        PspError: the settings ask for what is not there, or memory does not hold the weights.
    """
    work = workload(config)
    generator = torch.Generator().manual_seed(config.seed)
    cache = cache_bytes(work.device)
    slots = work.slot_count(cache, turn=_TURN + _DEFAULTS * config.tune)
    weights = draw_weights(work, slots, generator)
    inputs = {
        label: Inputs.draw(work, draw_slots(case, slots, config.tokens, generator), generator)
        for label, case in work.cases.items()
    }
    launches: dict[str, object] = {}
    if config.tune:
        launches["tuning"] = _tune(inputs.values(), weights)
    if work.device.type == "cuda":
        launches["launches"] = _launches(inputs.values(), weights)
    return {
        "shape": {"d_model": work.d_model, "d_ff": work.d_ff},
        "pattern": config.pattern if config.pattern in RUNS else "traced",
        "tokens": config.tokens,
        "dtype": str(work.dtype).removeprefix("torch."),
        "device": str(work.device),
        "hardware": hardware(work.device),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "triton": package_version("triton"),
        },
        "clock": "events in CUDA graphs" if work.device.type == "cuda" else "wall clock",
        "repeats": config.repeats,
        "weight_copies": slots,
        "cache_bytes": cache,
        "exceeds_cache": slots >= work.slots_needed(cache),
        **launches,
        "sparsities": [
            {"label": label, **_measure(config, work, each, weights)}
            for label, each in inputs.items()
        ],
    }


def _tune(inputs: Iterable[Inputs], weights: Tensor) -> dict[str, object]:
    """Tune for all sparsities at once; return the choices, the file that keeps them, all times."""
    from sparse_operators.triton_launch import keep_launches
    from sparse_operators.triton_tuning import tune

    scores = [each.scores for each in inputs]
    found = tune(scores, next(iter(inputs)).x, weights)
    launches = {
        problem.operator: launch and plain(launch) for problem, launch in found.chosen.items()
    }
    tried = {
        operator: [plain(launch) | {"seconds": _finite(times)} for launch, times in each.items()]
        for operator, each in found.tried.items()
    }
    file = str(keep_launches(found.chosen, weights.device))
    ffn = {"ffn_seconds": _finite(found.ffn), "fused_ffn_seconds": _finite(found.fused_ffn)}
    return {"file": file, "launches": launches, **ffn, "tried": tried}


def _finite(times: Iterable[float]) -> list[float | None]:
    """Return times for JSON: None of what a card cannot run."""
    return [time if isfinite(time) else None for time in times]


def _launches(inputs: Iterable[Inputs], weights: Tensor) -> str:
    """Say which launches the sparse operators take, `tuned` or `default`."""
    from sparse_operators.cuda import problem_of
    from sparse_operators.triton_launch import tuned_launches

    problem = problem_of("up", next(iter(inputs)).scores[0], weights.shape[-1])
    return "tuned" if problem in tuned_launches(weights.device) else "default"


def hardware(device: torch.device) -> dict[str, str | int | None]:
    """Return the name of what computes and, of a CPU, its threads, of a GPU, its driver."""
    if device.type != "cuda":
        return {"name": cpu_name(), "threads": torch.get_num_threads()}
    driver = next((card.driver for card in read_gpus().cards if card.driver), None)
    name = torch.cuda.get_device_name(device)
    return {"name": name, "cuda": torch.version.cuda, "driver": driver}


def operations(inputs: Inputs, weights: Tensor, *, defaults: bool = False) -> dict[str, Operation]:
    """Return what a turn times; the FFN's gate is dense in both kinds.

    Args:
        inputs: for each slot.
        weights: (slots, d_ff, d_model).
        defaults: also time the sparse operators' default launches, beside the tuned ones.
    """
    x, scores, intermediate, slots = inputs.x, inputs.scores, inputs.intermediate, len(weights)

    def dense_up(slot: int, matrix: int) -> Tensor:
        return scores[slot].relu() * linear(x[slot], weights[matrix % slots])

    def dense_down(slot: int, matrix: int) -> Tensor:
        # The same bytes in the layout of down_proj.weight, (d_model, d_ff).
        down = weights[matrix % slots].view(x.shape[-1], -1)
        return linear(intermediate[slot], down)

    def dense_ffn(slot: int) -> Tensor:
        linear(x[slot], weights[slot])
        dense_up(slot, slot + 1)
        return dense_down(slot, slot + 2)

    dense = {
        "s2": Operation(run=lambda slot: dense_up(slot, slot)),
        "s3": Operation(run=lambda slot: dense_down(slot, slot)),
        "ffn": Operation(run=dense_ffn, slots=3),
    }
    sparse = _sparse_operations(inputs, weights, deterministic=False)
    made = {"read": Operation(run=lambda slot: stream(weights[slot]))}
    for name in dense:
        made |= {f"{name}_dense": dense[name], name: sparse[name]}
    if defaults:
        default = _sparse_operations(inputs, weights, deterministic=True)
        made |= {f"{name}_default": operation for name, operation in default.items()}
    return made


def _sparse_operations(
    inputs: Inputs, weights: Tensor, *, deterministic: bool
) -> dict[str, Operation]:
    x, scores, intermediate, slots = inputs.x, inputs.scores, inputs.intermediate, len(weights)
    how = {"deterministic": deterministic, "check": False}

    def ffn(slot: int) -> Tensor:
        linear(x[slot], weights[slot])
        w1, w2t = weights[(slot + 1) % slots], weights[(slot + 2) % slots]
        return sparse_up_down(scores[slot], x[slot], w1, w2t, **how)

    return {
        "s2": Operation(run=lambda slot: sparse_up(scores[slot], x[slot], weights[slot], **how)),
        "s3": Operation(run=lambda slot: sparse_down(intermediate[slot], weights[slot], **how)),
        "ffn": Operation(run=ffn, slots=3),
    }


def _measure(
    config: OperatorBenchConfig, work: Workload, inputs: Inputs, weights: Tensor
) -> dict[str, object]:
    timed = operations(inputs, weights, defaults=config.tune)
    shape = (len(weights), config.repeats)
    eager: Samples | None = None
    if work.device.type == "cpu":
        samples = time_calls(timed, *shape, wall_seconds)
    else:
        eager = time_calls(timed, *shape, gpu_seconds)
        samples = time_graphs(timed, *shape)
    row: dict[str, object] = {
        "sparsity": 1 - inputs.active / work.d_ff,
        "token_sparsity": 1 - float((inputs.scores > 0).float().mean()),
        **judge(samples, work, inputs.active),
        **_errors(inputs, weights[0]),
        "samples": samples,
    }
    if eager is not None:
        row["eager"] = {**judge(eager, work, inputs.active), "samples": eager}
    return row


def judge(samples: Samples, work: Workload, active: float) -> dict[str, Any]:
    """Return medians, speedups and how far the operators are from the memory's bound.

    The bound is the least time in which an operator can read its active rows. The bandwidth is that
    of whichever read a whole matrix fastest, the plain read or a dense product: a bound that
    something beats is none.

    Args:
        samples: by the names of `operations`.
        work: sizes.
        active: mean number of neurons whose rows are read.
    """
    spread = {name: quartiles(times) for name, times in samples.items()}
    median = {name: middle for name, (_, middle, _) in spread.items()}
    bandwidth = work.matrix_bytes / min(median[name] for name in ("read", "s2_dense", "s3_dense"))
    bound = active * work.d_model * work.dtype.itemsize / bandwidth
    ratios = {name: median[name] / bound for name in ("s2", "s3")} if bound else {}
    result: dict[str, object] = {"bandwidth": bandwidth, "bandwidth_bound_seconds": bound}
    for name in ("s2", "s3", "ffn"):
        result[f"{name}_seconds"] = median[name]
        result[f"{name}_dense_seconds"] = median[f"{name}_dense"]
        result[f"{name}_speedup"] = median[f"{name}_dense"] / median[name]
    for name in ("s2", "s3"):
        result[f"{name}_bandwidth"] = bound * bandwidth / median[name]
        result[f"{name}_bandwidth_bound_ratio"] = ratios.get(name)
    result["bandwidth_bound_ratio"] = max(ratios.values(), default=None)
    result["quartiles"] = {name: [low, high] for name, (low, _, high) in spread.items()}
    if "s2_default" in median:
        result["default_seconds"] = {
            name: median[f"{name}_default"] for name in ("s2", "s3", "ffn")
        }
    return result


def _errors(inputs: Inputs, weight: Tensor) -> dict[str, float]:
    """Return ‖y − y₆₄‖ / ‖y₆₄‖ of both operators on the first slot, y₆₄ in float64."""
    x, scores, intermediate = inputs.x[0], inputs.scores[0], inputs.intermediate[0]
    wide = weight.double()
    s2 = reference.up(scores.double(), x.double(), wide)
    s3 = reference.down(intermediate.double(), wide)
    return {
        "s2_error": _distance(sparse_up(scores, x, weight), s2),
        "s3_error": _distance(sparse_down(intermediate, weight), s3),
    }


def _distance(found: Tensor, exact: Tensor) -> float:
    norm = float(exact.norm())
    return float((found.double() - exact).norm()) / norm if norm else float(found.double().norm())


def operator_table(document: Mapping[str, Any]) -> str:
    """Return the table of a document of `bench_operators`, and how it came about."""
    rows = document["sparsities"]
    lines = [table(_HEADER, [_cells(row) for row in rows]), ""]
    shape, hardware = document["shape"], document["hardware"]
    threads = f", {hardware['threads']} threads" if "threads" in hardware else ""
    tokens = f"{document['tokens']} tokens at once" if document["tokens"] > 1 else "one token"
    launches = f", {document['launches']} launches" if "launches" in document else ""
    lines.append(
        f"d_model {shape['d_model']}, d_ff {shape['d_ff']}, {document['dtype']}, "
        f"{document['pattern']} neurons, {tokens}; {hardware['name']}{threads}{launches}"
    )
    lines.append(
        f"medians of {document['repeats']} turns ({document['clock']}); middle half of the samples "
        f"within {max(_widest(row, row['quartiles']) for row in rows):.0%} of their median"
    )
    if not document["exceeds_cache"]:
        lines.append("note: so small a shape stays in a cache, whose speed this shows")
    lines += [_eager_line(row["label"], row["eager"]) for row in rows if "eager" in row]
    lines += [
        _default_line(row["label"], row, row["default_seconds"])
        for row in rows
        if "default_seconds" in row
    ]
    if "tuning" in document:
        lines.append(f"tuned launches are kept for later processes in {document['tuning']['file']}")
    return "\n".join(lines)


def _eager_line(label: str, eager: Mapping[str, float]) -> str:
    figures = (
        f"{name.upper()} {_micro(eager[f'{name}_seconds'])} µs ({eager[f'{name}_speedup']:.2f} ×)"
        for name in ("s2", "s3")
    )
    return f"with launches, {label}: {', '.join(figures)}"


def _default_line(label: str, tuned: Mapping[str, float], default: Mapping[str, float]) -> str:
    figures = (
        f"{name.upper()} {_micro(seconds)} µs ({seconds / tuned[f'{name}_seconds']:.2f} ×)"
        for name, seconds in default.items()
    )
    return f"with default launches, {label}: {', '.join(figures)}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    ratio = row["bandwidth_bound_ratio"]
    measured = f"{100 * row['sparsity']:.2f} %"
    exact = row["label"].endswith("%") and isclose(
        row["sparsity"], row["token_sparsity"], abs_tol=1e-6
    )
    return [
        measured if exact else f"{row['label']}: {measured}",
        *(
            cell
            for name in ("s2", "s3")
            for cell in (
                _micro(row[f"{name}_dense_seconds"]),
                _micro(row[f"{name}_seconds"]),
                f"{row[f'{name}_speedup']:.2f}",
            )
        ),
        f"{row['ffn_speedup']:.2f}",
        *(f"{row[f'{name}bandwidth'] / 1e9:.1f}" for name in ("s2_", "s3_", "")),
        "–" if ratio is None else f"{ratio:.2f}",
    ]


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def _widest(median: Mapping[str, float], quartiles: Mapping[str, list[float]]) -> float:
    """Return the largest distance of a quartile from its median, as a share of the median."""
    names = ("s2", "s3", "s2_dense", "s3_dense")
    return max(
        abs(end / median[f"{name}_seconds"] - 1) for name in names for end in quartiles[name]
    )
