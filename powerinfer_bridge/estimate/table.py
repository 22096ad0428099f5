"""An estimate as text; every heading says that it is one."""

from __future__ import annotations

from common.table import fact_table, table
from common.units import size
from results.estimate import CalibrationFacts, Estimate, VramBudget

_ARMS = {
    "dense": "dense",
    "all_neurons": "PowerInfer, all neurons",
    "predicted": "PowerInfer, predicted neurons",
}


def estimate_table(found: Estimate) -> str:
    """Return the text of an estimate."""
    parts = [_facts(found), _speeds(found), _parts(found)]
    if found.best_vram_budget is not None:
        parts.append(_budgets(found.vram_budgets, found.best_vram_budget))
    if found.calibration is not None:
        parts.append(_calibration(found.calibration))
    notes = [f"estimate, assumed: {line}" for line in found.assumptions]
    return "\n\n".join([*parts, "\n".join(notes)]).rstrip()


def _facts(found: Estimate) -> str:
    activity, dense, hardware = found.activity, found.dense, found.hardware_details
    facts = {
        "ESTIMATE": f"for {found.hardware}, nothing was run",
        "model": found.model,
        "computed": f"{activity.predicted:.1%} of the neurons predicted, "
        f"{activity.predicted_and_active:.1%} and active, {activity.active:.1%} active "
        f"({activity.source})",
        "token": f"at position {found.position:g}, context {found.context}",
    }
    devices = {"CPU": hardware.cpu, "GPU": hardware.gpu, "link": hardware.link}
    for name, device in devices.items():
        if device is not None:
            facts[name] = f"{device.bandwidth / 1e9:g} GB/s; {device.source}"
    if dense.n_gpu_layers is not None:
        fits = "fits into VRAM whole" if dense.fits_on_gpu else "does not fit into VRAM"
        facts["dense model"] = f"{size(dense.bytes)}, {fits}: -ngl {dense.n_gpu_layers}"
    if found.vram_budget_bytes is not None:
        facts["VRAM budget"] = f"{size(found.vram_budget_bytes)}, for all three"
    return fact_table(facts)


def _speeds(found: Estimate) -> str:
    speeds = found.tokens_per_second
    rows = [
        [title, f"{speeds[arm]:.2f}", f"{speeds['predicted'] / speeds[arm]:.2f}"]
        for arm, title in _ARMS.items()
    ]
    return table(["estimate", "tokens/s", "predicted over it"], rows)


def _parts(found: Estimate) -> str:
    seconds, devices = found.seconds, found.device_seconds
    rows = [
        [part.replace("_", " "), *(f"{1e3 * seconds[arm][part]:.3f}" for arm in _ARMS)]
        for part in seconds["predicted"]
    ]
    rows += [
        [f"busy: {device}", *(f"{1e3 * devices[arm][device]:.3f}" for arm in _ARMS)]
        for device in devices["predicted"]
    ]
    return table(["estimate, ms a token", "dense", "all neurons", "predicted"], rows)


def _budgets(budgets: tuple[VramBudget, ...], best: VramBudget) -> str:
    rows = [
        [
            size(each.bytes) + (" *" if each.best else "") + ("" if each.fits_on_card else " !"),
            f"{each.tokens_per_second:.2f}",
            "–" if (dense := each.dense_tokens_per_second) is None else f"{dense:.2f}",
            f"{each.neuron_share_on_gpu:.1%}",
            f"{each.activation_share_on_gpu:.1%}",
        ]
        for each in budgets
    ]
    heads = ("VRAM budget", "tokens/s", "dense engine", "neurons there", "activations there")
    text = table([f"estimate, {heads[0]}", *heads[1:]], rows)
    lines = [text, f"* smallest within 1 % of the fastest: {best.powerinfer_option}"]
    lost = [size(each.bytes) for each in budgets if _loses(each)]
    if lost:
        lines.append(f"the dense model in llama.cpp is faster with {', '.join(lost)}")
    if not all(each.fits_on_card for each in budgets):
        lines.append("! leaves less than the 256 MiB that PowerInfer keeps free")
    return "\n".join(lines)


def _loses(budget: VramBudget) -> bool:
    dense = budget.dense_tokens_per_second
    return dense is not None and dense > budget.tokens_per_second


def _calibration(found: CalibrationFacts) -> str:
    rows = [
        [
            each.run,
            f"{1e3 * each.seconds:.3f}",
            f"{1e3 * each.estimated_seconds:.3f}",
            f"{each.relative_error:+.1%}",
        ]
        for each in found.runs
    ]
    how = "left out in turn" if found.left_out else "NOT left out: too few runs"
    header = [f"calibration, {how}", "measured ms", "estimate ms", "error"]
    lines = [f"largest error of an estimate: {found.largest_error:.1%}"]
    if found.largest_ratio_error is not None:
        lines.append(
            f"largest error of predicted over all neurons: {found.largest_ratio_error:.1%}"
        )
    if found.passed_over:
        lines.append(f"passed over, because they had a GPU: {found.passed_over} runs")
    return "\n".join([table(header, rows), *lines])
