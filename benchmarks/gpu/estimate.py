"""The cost model's figures against this machine's, and its estimates against what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.hybrid_fixtures import DENSITY
from benchmarks.gpu.hybrid_programs import THREADS, TOKENS
from benchmarks.gpu.hybrid_vram import CONTEXT
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.kit import Absent, Figure, Kit, Step
from common.machine import read_processor
from cost_model.hardware import load_hardware, save_hardware
from cost_model.measure import measure_this
from powerinfer_bridge.estimate.run import estimate
from powerinfer_bridge.estimate.settings import EstimateConfig
from results.card import HYBRID_ARMS

_DRY_BYTES, _HARDWARE = 1 << 26, "this.yaml"

_PRESETS = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"}
"""Presets by the names that drivers give their cards."""


def machine(kit: Kit) -> Iterator[Figure]:
    """What `--hardware this` measures, and the preset of the card beside it."""
    threads = min(THREADS, read_processor().threads)
    found = measure_this(threads, *((_DRY_BYTES,) if kit.dry else ()))
    (kit.work / _HARDWARE).unlink(missing_ok=True)
    save_hardware(kit.work / _HARDWARE, found)
    yield Figure(
        name=f"CPU, streaming read by {threads} threads",
        value=found.cpu.bandwidth / 1e9,
        unit="GB/s",
        details={"rows": found.cpu.efficiency.rows},
    )
    if found.gpu is None or found.link is None:
        raise Absent("torch sees no GPU")
    yield Figure(name="GPU, a sum's read", value=found.gpu.bandwidth / 1e9, unit="GB/s")
    yield Figure(name="link, from pinned memory", value=found.link.bandwidth / 1e9, unit="GB/s")
    yield Figure(name="link, a copy of 4 bytes", value=1e6 * found.link.copy_seconds, unit="µs")
    preset = _PRESETS.get(found.gpu.name)
    if preset is None:
        raise Absent(f"no preset is of a {found.gpu.name}")
    told = load_hardware(preset, threads)
    assert told.gpu is not None
    assert told.link is not None
    pairs = {
        "GPU": (found.gpu.bandwidth, told.gpu.bandwidth * told.gpu.efficiency.matrix),
        "link": (found.link.bandwidth, told.link.bandwidth * told.link.efficiency),
    }
    for part, (measured, expected) in pairs.items():
        name = f"{part}, measured over {preset}'s"
        yield Figure(name=name, value=measured / expected, unit="×", least=0.9, most=1.1)


def runs(kit: Kit) -> Iterator[Figure]:
    """Estimates of what the stage `hybrid` timed, over its tokens/s."""
    measured = [
        figure
        for figure in Journal(kit.out).card().figures
        if figure.stage == "hybrid" and figure.details.get("arm") == HYBRID_ARMS[0]
    ]
    hardware = kit.work / _HARDWARE
    if not measured or not hardware.exists():
        raise Absent("run the stage hybrid and the step machine before")
    for figure in measured:
        budget = str(figure.details["budget"])
        config = EstimateConfig(
            file=Path(str(figure.details["file"])),
            hardware=str(hardware),
            density=DENSITY,
            vram_budget=None if kit.dry else budget,
            context=CONTEXT,
            position=TOKENS // 2,
        )
        told = estimate(config).tokens_per_second["predicted"]
        if told is not None:
            yield Figure(
                name=f"{figure.step}, {figure.name.removeprefix('speed, ')}: estimate",
                value=told / figure.value,
                unit="×",
                details={"estimate": told, "measured": figure.value, "budget": budget},
            )


STEPS = (
    Step(name="machine", seconds=12, run=machine),
    Step(name="runs", seconds=10, run=runs),
)
"""Of this stage."""
