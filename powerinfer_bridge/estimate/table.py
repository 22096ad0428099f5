"""An estimate as text; every heading says that it is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.table import fact_table, table

_ARMS = {
    "dense": "dense",
    "all_neurons": "PowerInfer, all neurons",
    "predicted": "PowerInfer, predicted neurons",
}
_GIB, _MIB = 1 << 30, 1 << 20


def estimate_table(document: Mapping[str, Any]) -> str:
    """Return the text of an estimate."""
    parts = [_facts(document), _speeds(document), _parts(document)]
    if document["vram_budgets"]:
        parts.append(_budgets(document))
    if document["calibration"]:
        parts.append(_calibration(document["calibration"]))
    notes = [f"estimate, assumed: {line}" for line in document["assumptions"]]
    return "\n\n".join([*parts, "\n".join(notes)]).rstrip()


def _facts(document: Mapping[str, Any]) -> str:
    activity, dense = document["activity"], document["dense"]
    facts = {
        "ESTIMATE": f"for {document['hardware']}, nothing was run",
        "model": document["model"],
        "computed": f"{activity['predicted']:.1%} of the neurons predicted, "
        f"{activity['predicted_and_active']:.1%} and active, {activity['active']:.1%} active "
        f"({activity['source']})",
        "token": f"at position {document['position']:g}, context {document['context']}",
    }
    for name in ("cpu", "gpu", "link"):
        device = document["hardware_details"][name]
        if device:
            text = f"{device['bandwidth'] / 1e9:g} GB/s"
            facts[name.upper() if name != "link" else name] = f"{text}; {device['source']}"
    if dense["n_gpu_layers"] is not None:
        fits = "fits into VRAM whole" if dense["fits_on_gpu"] else "does not fit into VRAM"
        facts["dense model"] = f"{_size(dense['bytes'])}, {fits}: -ngl {dense['n_gpu_layers']}"
    if document["vram_budget_bytes"] is not None:
        facts["VRAM budget"] = f"{_size(document['vram_budget_bytes'])}, for all three"
    return fact_table(facts)


def _speeds(document: Mapping[str, Any]) -> str:
    speeds = document["tokens_per_second"]
    rows = [
        [title, f"{speeds[arm]:.2f}", f"{speeds['predicted'] / speeds[arm]:.2f}"]
        for arm, title in _ARMS.items()
    ]
    return table(["estimate", "tokens/s", "predicted over it"], rows)


def _parts(document: Mapping[str, Any]) -> str:
    seconds, devices = document["seconds"], document["device_seconds"]
    rows = [
        [part.replace("_", " "), *(f"{1e3 * seconds[arm][part]:.3f}" for arm in _ARMS)]
        for part in seconds["predicted"]
    ]
    rows += [
        [f"busy: {device}", *(f"{1e3 * devices[arm][device]:.3f}" for arm in _ARMS)]
        for device in devices["predicted"]
    ]
    return table(["estimate, ms a token", "dense", "all neurons", "predicted"], rows)


def _budgets(document: Mapping[str, Any]) -> str:
    rows = [
        [
            _size(row["bytes"])
            + (" *" if row["best"] else "")
            + ("" if row["fits_on_card"] else " !"),
            f"{row['tokens_per_second']:.2f}",
            f"{row['neuron_share_on_gpu']:.1%}",
            f"{row['activation_share_on_gpu']:.1%}",
        ]
        for row in document["vram_budgets"]
    ]
    best = document["best_vram_budget"]
    text = table(["estimate, VRAM budget", "tokens/s", "neurons there", "activations there"], rows)
    lines = [text, f"* smallest within 1 % of the fastest: {best['powerinfer_option']}"]
    if not all(row["fits_on_card"] for row in document["vram_budgets"]):
        lines.append("! leaves less than the 256 MiB that PowerInfer keeps free")
    return "\n".join(lines)


def _calibration(calibration: Mapping[str, Any]) -> str:
    rows = [
        [
            row["run"],
            f"{1e3 * row['seconds']:.3f}",
            f"{1e3 * row['estimated_seconds']:.3f}",
            f"{row['relative_error']:+.1%}",
        ]
        for row in calibration["runs"]
    ]
    how = "left out in turn" if calibration["left_out"] else "NOT left out: too few runs"
    header = [f"calibration, {how}", "measured ms", "estimate ms", "error"]
    ratio = calibration["largest_ratio_error"]
    lines = [f"largest error of an estimate: {calibration['largest_error']:.1%}"]
    if ratio is not None:
        lines.append(f"largest error of predicted over all neurons: {ratio:.1%}")
    return "\n".join([table(header, rows), *lines])


def _size(size: float) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB or not size else f"{size / _MIB:.2f} MiB"
