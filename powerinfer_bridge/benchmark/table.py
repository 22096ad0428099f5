"""A benchmark as a text table, with the model card's columns first."""

from __future__ import annotations

from pathlib import Path

from common.table import metric_cell, table
from powerinfer_bridge.benchmark.journal import JOURNAL
from results.bench import ALL_NEURONS, BENCH, POWERINFER, PREDICTED, SAMPLES, SECOND, Arm, Bench

_COLUMNS = ("activation_sparsity", "activation_recall", "predicted_sparsity", "ffn_bytes_ratio")
_HEADER = ("model", "sparsity %", "recall %", "pred. sparsity %", "FFN bytes", "perplexity")
_SAID_ABOVE = {"embedded-engine", "texts-differ"}
"""Warnings that the lines under the table give already."""


def bench_table(result: Bench) -> str:
    """Return the table of a benchmark and what must be known to read it.

    Rows are the arms. `speedup` is over all neurons; with a dense baseline `vs dense` is over the
    fastest one, as in a model card.
    """
    base = result.fastest_dense()
    header = [*_HEADER, "tokens/s", "speedup", *(["vs dense"] if base else [])]
    rows = [[*_cells(result, arm), *_ratios(result, arm, base)] for arm in result.arms]
    lines = [table(header, rows), "", _quality_line(result), *_thread_lines(result)]
    lines += [*_baseline_lines(result, base), *_engine_lines(result)]
    lines += [
        f"warning: {warning.text}" for warning in result.warnings if warning.code not in _SAID_ABOVE
    ]
    return "\n".join(lines)


def results_line(out: Path) -> str:
    """Say where a benchmark's files lie."""
    return f"results: {out / BENCH.name}, {out / SAMPLES}, {out / JOURNAL}"


def _cells(result: Bench, arm: Arm) -> list[str]:
    if arm.name == PREDICTED:
        figures = [metric_cell(key, getattr(result, key)) for key in _COLUMNS]
        return [f"{result.model}, predicted", *figures, f"{result.ppl_sparse:.4f}"]
    if arm.name == ALL_NEURONS:
        sparsity = metric_cell(_COLUMNS[0], result.activation_sparsity)
        name = f"{result.model}, all neurons"
        return [name, sparsity, "–", "–", "–", f"{result.ppl_dense:.4f}"]
    perplexity = "–" if arm.perplexity is None else f"{arm.perplexity:.4f}"
    if arm.ffn_bytes_ratio is None:
        return [arm.title, "–", "–", "–", "–", perplexity]
    sparsity = metric_cell("activation_sparsity", result.activation_sparsity)
    ratio = metric_cell("ffn_bytes_ratio", arm.ffn_bytes_ratio)
    return [arm.title, sparsity, "–", "–", ratio, perplexity]


def _ratios(result: Bench, arm: Arm, base: Arm | None) -> list[str]:
    """Return an arm's speed, and over what it is how much faster."""
    speed = arm.decode.tokens_per_second
    over = [result.tokens_per_second_dense, *([base.decode.tokens_per_second] if base else [])]
    return [f"{speed:.2f}", *(f"{speed / other:.2f}" for other in over)]


def _quality_line(result: Bench) -> str:
    own = result.ppl_transformers
    known = "" if own is None else f"; transformers' own perplexity {own:.4f}"
    error = "" if result.ppl_gap_error is None else f" ± {100 * result.ppl_gap_error:.3f} %"
    return f"perplexity gap {100 * result.ppl_gap:+.3f} %{error}; {_compare_texts(result)}{known}"


def _thread_lines(result: Bench) -> list[str]:
    """Say what the threads that were timed make of the text, where that is a question."""
    if result.ppl_threads is None or result.damage is None:
        return []
    threads = max(arm.threads for arm in result.arms if arm.name == PREDICTED)
    return [
        f"with {threads} threads, as timed: perplexity {result.ppl_threads:.4f} "
        f"({100 * result.damage:+.3f} %)"
    ]


def _baseline_lines(result: Bench, base: Arm | None) -> list[str]:
    """Say what the dense baseline was, and how sure the speedup over it is."""
    ratio = result.over(base.name) if base else None
    if base is None or ratio is None:
        return []
    low, high = ratio.quartiles
    experts = result.experts_cost
    cost = [] if experts is None else [_experts_line(experts)]
    return [
        *cost,
        f"vs dense: {base.title}, {base.element_type}, {base.threads} threads, "
        f"-ngl {base.n_gpu_layers or 0}",
        f"predicted against it: {ratio.ratio:.2f} times; round by round "
        f"{low:.2f} to {high:.2f} (quartiles of {base.decode.rounds})",
    ]


def _experts_line(ratio: float) -> str:
    """Say what the graph costs in which llama.cpp computes ReLU."""
    return (
        f"llama.cpp computes ReLU in its graph of experts, at {ratio:.2f} times the speed of arch "
        "llama (SiLU, wrong text) here"
    )


def _engine_lines(result: Bench) -> list[str]:
    if result.engine == POWERINFER:
        engine = "engine: PowerInfer; sparsity and recall by the embedded engine"
    else:
        engine = (
            "engine: embedded engine; its tokens/s are not PowerInfer's (pass --powerinfer-bin)"
        )
    second = result.arm(SECOND)
    exact = (
        "second engine: skips neurons by the sign of their gate, without predictors; its FFN bytes "
        "are those of the activity that psp counted"
    )
    threshold = "all neurons: threshold -1e30 in the same engine, predictors still evaluated"
    lines = [engine, *([exact] if second else []), f"{threshold}; text: {result.text}"]
    if result.estimate is not None:
        speeds = result.estimate.tokens_per_second
        stated = ", ".join(f"{name.replace('_', ' ')} {speeds[name]:.2f}" for name in speeds)
        lines.append(f"estimate for {result.estimate.hardware}, tokens/s: {stated}")
    return lines


def _compare_texts(result: Bench) -> str:
    if result.greedy_text_same:
        return "greedy text identical"
    sparse, dense = result.continuations.sparse, result.continuations.dense
    if sparse == dense:
        return "greedy text differs for some prompts"
    same = next(
        (at for at, (a, b) in enumerate(zip(sparse, dense, strict=False)) if a != b),
        min(len(sparse), len(dense)),
    )
    return f"greedy text differs after {same} of {len(dense)} characters"
