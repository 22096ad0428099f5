"""A benchmark of the operators as text, with the model card's columns first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.table import table

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


def operator_table(document: Mapping[str, Any]) -> str:
    """Return the table of a document of `benchmark.bench_operators`, and how it came about."""
    rows = document["sparsities"]
    lines = [table(_HEADER, [_cells(row) for row in rows]), ""]
    shape, hardware = document["shape"], document["hardware"]
    threads = f", {hardware['threads']} threads" if "threads" in hardware else ""
    lines.append(
        f"d_model {shape['d_model']}, d_ff {shape['d_ff']}, {document['dtype']}, "
        f"{document['pattern']} neurons, one token; {hardware['name']}{threads}"
    )
    lines.append(
        f"medians of {document['repeats']} turns ({document['clock']}); middle half of the samples "
        f"within {max(map(_widest, rows)):.0%} of their median"
    )
    if not document["exceeds_cache"]:
        lines.append("note: so small a shape stays in a cache, whose speed this shows")
    for row in rows:
        if "eager" in row:
            eager = row["eager"]
            lines.append(
                f"with launches, {row['label']}: S2 {_micro(eager['s2_seconds'])} µs "
                f"({eager['s2_speedup']:.2f} ×), S3 {_micro(eager['s3_seconds'])} µs "
                f"({eager['s3_speedup']:.2f} ×)"
            )
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    ratio = row["bandwidth_bound_ratio"]
    measured = f"{100 * row['sparsity']:.2f} %"
    return [
        measured if row["label"].endswith("%") else f"{row['label']}: {measured}",
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


def _widest(row: Mapping[str, Any]) -> float:
    """Return the largest distance of a quartile from its median, as a share of the median."""
    names = ("s2", "s3", "s2_dense", "s3_dense")
    distances = (
        abs(end / row[f"{name}_seconds"] - 1) for name in names for end in row["quartiles"][name]
    )
    return float(max(distances))
