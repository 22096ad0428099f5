"""Measurements of sparsity as text tables, with the columns of the ProSparse models' card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.table import table


def sparsity_table(document: Mapping[str, Any]) -> str:
    """Return one row a setting, one row a layer, and what they were measured on."""
    settings = document["settings"]
    rows = [
        [
            setting["setting"],
            f"{100 * setting['activation_sparsity']:.2f}",
            f"{setting['ppl']:.4f}",
            f"{100 * setting['ppl_gap']:+.3f}",
            f"{100 * setting['standard_error']:.3f}",
        ]
        for setting in settings
    ]
    header = ["setting", "average sparsity %", "perplexity", "gap %", "± %"]
    return "\n\n".join([table(header, rows), _layers(settings), _told(document)])


def _layers(settings: list[Mapping[str, Any]]) -> str:
    columns = [setting["layers"] for setting in settings]
    rows = [
        [str(number), *(f"{100 * layer['activation_sparsity']:.2f}" for layer in layers)]
        for number, *layers in zip(range(len(columns[0])), *columns, strict=True)
    ]
    return table(["layer, sparsity %", *(setting["setting"] for setting in settings)], rows)


def _told(document: Mapping[str, Any]) -> str:
    base = document["settings"][0]["setting"]
    lines = [
        f"{document['tokens']} tokens of {document['data']}; gaps are to {base}, ± their standard "
        "error"
    ]
    if (search := document.get("search")) is not None:
        found = document["settings"][-1]["setting"]
        lines.append(f"found within a gap of {search['max_ppl_gap']:.3%}: {found}")
        if search["per_layer"]:
            lines.append(
                "thresholds by layer: " + ", ".join(f"{t:g}" for t in search["thresholds"])
            )
    if "out" in document:
        lines.append(f"written to {document['out']}; the last row is measured from its files")
    return "\n".join(lines)
