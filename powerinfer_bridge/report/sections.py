"""What stands in each section of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.version import tool_version
from powerinfer_bridge.report import pictures, tables
from powerinfer_bridge.report.comparison import comparison, warnings
from powerinfer_bridge.report.load import MAKERS
from powerinfer_bridge.report.results import Bench, Run
from powerinfer_bridge.report.speed_figures import PARTS
from powerinfer_bridge.report.svg import COLOURS, page_style
from powerinfer_bridge.report.verdict import ARM_TITLES, baseline, verdict

REMEDIES = {
    "summary": ("speed and quality", MAKERS["bench.json"]),
    "speed": ("speed", MAKERS["bench.json"]),
    "layers": ("layers", MAKERS["bench.json"]),
    "search": ("quality against bytes", MAKERS["report.json"]),
    "hot": ("hot neurons", MAKERS["report.json"]),
    "memory": ("memory", MAKERS["bench.json"]),
    "density": ("speed by density", MAKERS["density.json"]),
    "estimates": ("estimate", MAKERS["estimate.json"]),
}
"""Name of each section, and what to run to fill it."""

_HARDWARE = ("engine", "hardware", "versions", "created")
_SETTINGS = ("file", "settings", "context", "text", "prompts")
_ARM = (
    "engine",
    "file",
    "element_type",
    "threads",
    "n_gpu_layers",
    "vram_budget_bytes",
    "threshold",
    "load_seconds",
    "environment",
    "device",
)


def contents(runs: Sequence[Run]) -> dict[str, Any]:
    """Return everything that the template names."""
    with page_style():
        ends = pictures.scales(runs)
        views = [_view(run, f"r{number}", ends) for number, run in enumerate(runs)]
    return {
        "title": _title(runs),
        "views": views,
        "compared": comparison(runs),
        "warnings": warnings(runs),
        "columns": {
            "summary": tables.SUMMARY,
            "quality": tables.QUALITY,
            "estimate": tables.ESTIMATE,
        },
        "parts": [(COLOURS[colour][0], title) for title, colour in PARTS.values()],
        "colours": list(COLOURS.values()),
        "remedies": REMEDIES,
        "subject": ARM_TITLES["predicted"],
        "missing": [key for key in REMEDIES if not any(view[key] for view in views)],
        "version": tool_version(),
    }


def _title(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    measured = runs[0].bench or runs[0].predictors
    return measured.model if measured else runs[0].name


def _view(run: Run, name: str, ends: pictures.Scales) -> dict[str, Any]:
    bench = run.bench
    return {
        "id": name,
        "run": run,
        "verdict": verdict(bench) if bench else None,
        "summary": tables.summary_rows(bench) if bench else [],
        "baseline": _baseline(bench),
        "has_dense": bench is not None and any(a.name.startswith("dense") for a in bench.arms),
        "quality": tables.quality_row(bench) if bench else [],
        "speed": pictures.speed_pictures(bench, name, ends),
        "layers": pictures.layer_pictures(run, name, ends),
        "search": pictures.search_pictures(run, name),
        "hot": pictures.hot_pictures(run, name),
        "memory": pictures.memory_pictures(bench, name, ends),
        "memory_rows": tables.memory_rows(bench.devices, list(PARTS)) if bench else [],
        "density": pictures.density_pictures(run, name),
        "estimates": tables.estimates(run),
        "details": _details(run),
        "layer_rows": tables.layer_rows(run.layers),
    }


def _baseline(bench: Bench | None) -> str:
    over = None if bench is None else baseline(bench)
    return "" if over is None else ARM_TITLES[over]


def _details(run: Run) -> dict[str, Any]:
    facts = run.bench.facts if run.bench else {}
    trained = run.predictors.facts if run.predictors else {}
    return {
        "machine": tables.facts(facts, *_HARDWARE),
        "settings": tables.facts(facts, *_SETTINGS),
        "predictors": tables.facts(trained, *trained),
        "inputs": tables.input_rows(run.bench) if run.bench else [],
        "arms": [
            (ARM_TITLES[arm.name], tables.command_line(arm), tables.facts(arm.facts, *_ARM))
            for arm in (run.bench.arms if run.bench else ())
        ],
        "texts": tables.facts(facts, "continuations"),
    }
