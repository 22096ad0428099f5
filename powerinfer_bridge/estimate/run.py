"""`psp estimate`: tokens per second that bytes and bandwidths allow an exported file.

Everything in it is an estimate: sums of bytes over bandwidths (`cost_model.roofline`), with
PowerInfer's own placement (`gguf_export.pwri.memory_plan`) and our choice of neurons
(`gguf_export.pwri.gpu_split`). Nothing is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.errors import EngineError
from common.files import refuse_existing, write_json
from common.units import parse_size
from common.version import tool_version
from cost_model.hardware import Hardware, load_hardware, save_hardware
from cost_model.model_bytes import Activity, Place, mean_activity, on_cpu
from cost_model.roofline import Cost, best_dense, sparse_token
from gguf_export.pwri.memory_plan import KEPT_FREE, vram_option
from powerinfer_bridge.estimate.activity import ActivitySource, bench_activity, stated_activity
from powerinfer_bridge.estimate.calibration import calibrate_hardware
from powerinfer_bridge.estimate.file import EstimatedFile, Placement
from powerinfer_bridge.estimate.settings import EstimateConfig

ESTIMATE_FILE = "estimate.json"
KIND, SCHEMA_VERSION, LABEL = "psp.estimate", 1, "estimate"

_STEPS = 8
_GOOD_ENOUGH = 0.99


@dataclass(frozen=True)
class _Setting:
    """All that the estimates of one document share."""

    config: EstimateConfig
    file: EstimatedFile
    hardware: Hardware
    activity: ActivitySource

    @property
    def position(self) -> float:
        """Tokens in the cache."""
        given = self.config.position
        return self.config.context / 2 if given is None else float(given)

    def placement(self, budget: int) -> Placement | None:
        """Where everything lies; None without a GPU."""
        return self.file.place(budget, self.config.context) if self.hardware.gpu else None

    def sparse(self, placement: Placement | None, activities: Sequence[Activity]) -> Cost:
        """What a token costs in PowerInfer."""
        place: Place = placement.place if placement else on_cpu(self.file.hyper.n_layers)
        return sparse_token(self.file.bytes, place, self.hardware, activities, self.position)


def estimate(config: EstimateConfig) -> dict[str, Any]:
    """Estimate a file's speed.

    Returns:
        The document that estimate.json holds; see docs/estimate.md. `tokens_per_second` has
        `dense`, `all_neurons` and `predicted`.

    Raises:
        PspError: a damaged file or hardware, missing statistics, or an existing output.
    """
    targets = [config.out / ESTIMATE_FILE] if config.out else []
    for target in [*targets, *([config.save_hardware] if config.save_hardware else [])]:
        refuse_existing(target, force=config.force)
    file = EstimatedFile(config.file)
    activity = _activity(config, file.hyper.n_layers)
    hardware = load_hardware(config.hardware, config.threads)
    calibration = None
    if config.calibrate:
        hardware, calibration = calibrate_hardware(hardware, config.calibrate, file)
    document = _document(_Setting(config, file, hardware, activity)) | {"calibration": calibration}
    if config.save_hardware:
        save_hardware(config.save_hardware, hardware)
    for target in targets:
        write_json(target, document)
    return document


def _activity(config: EstimateConfig, n_layers: int) -> ActivitySource:
    if config.bench is not None:
        return bench_activity(config.bench, n_layers)
    assert config.density is not None
    return stated_activity(n_layers, config.density, config.precision, config.active)


def _document(setting: _Setting) -> dict[str, Any]:
    config, file, hardware = setting.config, setting.file, setting.hardware
    # A dense engine's compute buffers are assumed to take as much as PowerInfer leaves free.
    card = max(0, hardware.gpu.memory - KEPT_FREE) if hardware.gpu else 0
    budget = card if config.vram_budget is None else _asked_budget(config.vram_budget, hardware)
    placement = setting.placement(budget)
    layers = setting.activity.layers
    n_gpu_layers, dense = best_dense(file.bytes, hardware, budget, config.context, setting.position)
    costs = {
        "dense": dense,
        "all_neurons": setting.sparse(placement, [each.all_neurons for each in layers]),
        "predicted": setting.sparse(placement, layers),
    }
    table = _budgets(setting, card) if hardware.gpu else []
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "label": LABEL,
        "tool_version": tool_version(),
        "model": file.hyper.name,
        "file": str(config.file),
        "hardware": hardware.name,
        "hardware_details": asdict(hardware)
        | {"notes": list(hardware.notes), "byte_seconds": hardware.byte_seconds()},
        "context": config.context,
        "position": setting.position,
        "activity": _activity_facts(setting.activity),
        "assumptions": _assumptions(setting),
        "tokens_per_second": {name: cost.tokens_per_second for name, cost in costs.items()},
        "speedups": {
            f"predicted_over_{name}": cost.seconds / costs["predicted"].seconds
            for name, cost in costs.items()
            if name != "predicted"
        },
        "seconds": {name: cost.parts | {"total": cost.seconds} for name, cost in costs.items()},
        "device_seconds": {name: cost.devices for name, cost in costs.items()},
        "device_bytes": {name: cost.read for name, cost in costs.items()},
        "dense": {
            "bytes": file.bytes.dense,
            "kv_cache_bytes": file.kv_cache(config.context),
            "fits_on_gpu": bool(hardware.gpu) and n_gpu_layers > file.hyper.n_layers,
            "n_gpu_layers": n_gpu_layers if hardware.gpu else None,
        },
        "vram_budget_bytes": budget if hardware.gpu else None,
        "placement": _placement_facts(placement),
        "vram_budgets": table,
        "best_vram_budget": next((row for row in table if row["best"]), None),
    }


def _asked_budget(text: str, hardware: Hardware) -> int:
    if not hardware.gpu:
        raise EngineError(f"--vram-budget: hardware {hardware.name} has no GPU", "leave it out")
    budget = parse_size(text)
    if budget > hardware.gpu.memory:
        raise EngineError(
            f"--vram-budget {text} is more than the {hardware.gpu.memory} bytes of {hardware.name}",
            "lower it",
        )
    return budget


def _activity_facts(source: ActivitySource) -> dict[str, Any]:
    mean = mean_activity(source.layers)
    return {
        "source": source.text,
        "predicted": mean.predicted,
        "predicted_and_active": mean.both,
        "active": mean.active,
        "layers": [asdict(each) for each in source.layers],
    }


def _assumptions(setting: _Setting) -> list[str]:
    lines = [*setting.activity.assumptions, *setting.hardware.notes]
    if setting.hardware.threads is not None:
        lines.append(f"the CPU's figures are for --threads {setting.hardware.threads}")
    if setting.hardware.gpu:
        lines.append("copies over the link are counted in PowerInfer's source, not measured")
        lines.append(
            "neurons in VRAM are predicted in the proportion of the statistics beside the file"
        )
    return lines


def _placement_facts(placement: Placement | None) -> dict[str, Any] | None:
    if placement is None:
        return None
    return {
        "everything_but_ffn_fits": placement.plan.complete,
        "kv_cache_in_vram": placement.plan.kv_halves == 2,
        "neuron_share_on_gpu": placement.neuron_share,
        "activation_share_on_gpu": placement.activation_share,
    }


def _budgets(setting: _Setting, card: int) -> list[dict[str, Any]]:
    """Return a row for each of some budgets, the best one marked.

    They go in equal steps from nothing to all that the file and the card have a use for, and count
    the point where everything but neurons fits, and the budget asked for. The best is the smallest
    within 1 % of the fastest.
    """
    file, context = setting.file, setting.config.context
    kv = file.kv_cache(context)
    top = min(card, file.everything + kv)
    points = {top * step // _STEPS for step in range(_STEPS + 1)}
    points |= {each for each in (file.but_neurons, file.but_neurons + kv) if each < top}
    asked = setting.config.vram_budget
    if asked is not None:
        points.add(parse_size(asked))
    rows = [_budget_row(setting, budget, card) for budget in sorted(points)]
    fitting = [row for row in rows if row["fits_on_card"]]
    fastest = max(row["tokens_per_second"] for row in fitting)
    best = next(r for r in fitting if r["tokens_per_second"] >= _GOOD_ENOUGH * fastest)
    best["best"] = True
    return rows


def _budget_row(setting: _Setting, budget: int, card: int) -> dict[str, Any]:
    option, granted = vram_option(budget)
    placement = setting.placement(granted)
    cost = setting.sparse(placement, setting.activity.layers)
    return {
        "bytes": granted,
        "powerinfer_option": f"--vram-budget {option}",
        "fits_on_card": budget <= card,
        "tokens_per_second": cost.tokens_per_second,
        **(_placement_facts(placement) or {}),
        "best": False,
    }
