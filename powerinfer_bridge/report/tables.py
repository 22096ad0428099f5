"""The page's tables, as texts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from powerinfer_bridge.report.formats import NOTHING, per_cent, ratio, signed_per_cent, size, speed
from powerinfer_bridge.report.results import METRICS, Arm, Bench, Estimate, Layer, Run, Spread
from powerinfer_bridge.report.verdict import ARM_TITLES, baseline

Row = list[str]

SUMMARY = (
    "sparsity %",
    "recall %",
    "predicted sparsity %",
    "FFN bytes",
    "perplexity",
    "prompt tokens/s",
    "tokens/s",
    "vs dense",
)
QUALITY = ("with predictors", "all neurons", "gap", "transformers", "greedy text")
ESTIMATE = ("measured", "estimate", "estimate / measured")


def summary_rows(bench: Bench) -> list[Row]:
    """Return a row for each arm: its title, then the columns of `SUMMARY`."""
    over = baseline(bench)
    base = None if over is None else bench.arm(over)
    return [
        [
            ARM_TITLES[arm.name],
            *_decisions(bench, arm.name),
            _perplexity(bench, arm.name),
            _median(arm.prompt),
            speed(arm.decode.median),
            _against(bench, arm, base),
        ]
        for arm in bench.arms
    ]


def _decisions(bench: Bench, arm: str) -> Row:
    sparsity = per_cent(bench.metrics["activation_sparsity"])
    if arm == "all_neurons":
        return [sparsity, NOTHING, NOTHING, NOTHING]
    if arm != "predicted":
        return [NOTHING] * 4
    shares = [per_cent(bench.metrics[key]) for key in ("activation_recall", "predicted_sparsity")]
    return [sparsity, *shares, f"{bench.metrics['ffn_bytes_ratio']:.3f}"]


def _perplexity(bench: Bench, name: str) -> str:
    return f"{bench.perplexity[name]:.4f}" if name in bench.perplexity else NOTHING


def _median(spread: Spread | None) -> str:
    return NOTHING if spread is None else speed(spread.median)


def _against(bench: Bench, arm: Arm, base: Arm | None) -> str:
    if base is None:
        return NOTHING
    measured = bench.speedup(base.name) if arm.name == "predicted" else None
    return ratio(measured.ratio if measured else arm.decode.median / base.decode.median)


def quality_row(bench: Bench) -> Row:
    """Return the columns of `QUALITY`."""
    same = {True: "the same", False: "differs", None: NOTHING}[bench.same_text]
    return [
        _perplexity(bench, "predicted"),
        _perplexity(bench, "all_neurons"),
        signed_per_cent(bench.gap),
        _perplexity(bench, "transformers"),
        same,
    ]


def estimates(run: Run) -> list[tuple[Estimate, list[Row]]]:
    """Return what the cost model expects, and its table: an arm, then the columns of `ESTIMATE`."""
    known = [run.bench.estimate if run.bench else None, run.estimate]
    kept = [each for number, each in enumerate(known) if each and each not in known[:number]]
    return [(each, _estimate_rows(each, run.bench)) for each in kept]


def _estimate_rows(estimate: Estimate, bench: Bench | None) -> list[Row]:
    rows = []
    for name, value in estimate.tokens_per_second.items():
        arm = _measured(name, bench)
        measured = NOTHING if arm is None else speed(arm.decode.median)
        share = NOTHING if arm is None else ratio(value / arm.decode.median)
        title = arm.name if arm is not None else name
        rows.append([ARM_TITLES.get(title, title.replace("_", " ")), measured, speed(value), share])
    return rows


def _measured(name: str, bench: Bench | None) -> Arm | None:
    """Return the arm that an estimate is about; the faster one of two dense."""
    if bench is None:
        return None
    if name != "dense":
        return bench.arm(name)
    over = baseline(bench)
    return bench.arm(over) if over is not None and over.startswith("dense") else None


def memory_rows(devices: Mapping[str, Mapping[str, float]], parts: Sequence[str]) -> list[Row]:
    """Return a row for each part: its bytes on every device; the last row is their sum."""
    columns = list(devices.values())
    rows = [[size(column.get(part, 0)) for column in columns] for part in parts]
    return [*rows, [size(sum(column.values())) for column in columns]]


def layer_rows(layers: Sequence[Layer]) -> list[Row]:
    """Return a row for each layer: number, rank and the metrics in their order."""
    return [
        [str(layer.number), str(layer.rank), *(per_cent(layer.metrics[key]) for key in METRICS)]
        for layer in layers
    ]


def input_rows(bench: Bench) -> list[Row]:
    """Return a row for each file that was measured: its role, name, size and hash."""
    rows = bench.facts.get("inputs")
    inputs = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [
        [
            *(str(row.get(key, NOTHING)) for key in ("role", "path")),
            _size(row.get("bytes")),
            str(row.get("xxh3_128", NOTHING)),
        ]
        for row in inputs
    ]


def _size(count: object) -> str:
    return size(count) if isinstance(count, int) else NOTHING


def command_line(arm: Arm) -> str:
    """Return what was run, quoted for a shell; empty if the result does not say."""
    command = arm.facts.get("command")
    return shlex.join(map(str, command)) if isinstance(command, list) else ""


def facts(values: Mapping[str, Any], *keys: str) -> list[tuple[str, str]]:
    """Return some of a result's keys as lines of name and value, nested ones under dotted names."""
    kept = (key for key in keys if values.get(key) not in (None, [], {}))
    return [line for key in kept for line in _lines(key, values[key])]


def _lines(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if inner is not None:
                yield from _lines(f"{name}.{key}", inner)
    elif isinstance(value, str):
        yield name, value
    else:
        yield name, json.dumps(value, ensure_ascii=False)
