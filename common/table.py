"""Results as text tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_METRICS = {
    "activation_sparsity": "sparsity %",
    "activation_recall": "recall %",
    "precision": "precision %",
    "predicted_sparsity": "pred. sparsity %",
    "ffn_bytes_ratio": "FFN bytes",
    "bytes_with_predictor": "with predictor",
}
_RATIOS = {"ffn_bytes_ratio", "bytes_with_predictor"}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])


def metric_cell(key: str, value: float) -> str:
    """Return a metric as tables show it: a ratio as it is, a share in per cent."""
    return f"{value:.3f}" if key in _RATIOS else f"{100 * value:.2f}"


def layer_table(layers: Sequence[Mapping[str, float]], mean: Mapping[str, float] | None) -> str:
    """Return one row a layer, and the mean if given; columns are the metrics that any layer has.

    Args:
        layers: metrics by name, and the layer's number under `layer`.
        mean: metrics by name.
    """
    keys = [key for key in _METRICS if any(key in layer for layer in layers)]
    named = [(str(int(layer["layer"])), layer) for layer in layers]
    if mean is not None:
        named.append(("mean", mean))
    rows = [
        [name, *(metric_cell(key, layer[key]) if key in layer else "" for key in keys)]
        for name, layer in named
    ]
    return table(["layer", *(_METRICS[key] for key in keys)], rows)


def fact_table(facts: Mapping[str, Any]) -> str:
    """Return one line a fact, names aligned."""
    width = max(map(len, facts))
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {facts[name]}" for name in facts)
