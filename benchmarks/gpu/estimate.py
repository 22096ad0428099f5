"""The cost model's figures against this machine's, and its estimates against what was measured."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu.kit import Absent, Figure, Kit, Step
from common.machine import read_processor
from cost_model.hardware import load_hardware
from cost_model.measure import measure_this
from powerinfer_bridge.estimate.run import estimate
from powerinfer_bridge.estimate.settings import EstimateConfig
from results.bench import BENCH

_DRY_BYTES = 1 << 26

_PRESETS = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"}
"""Presets by the names that drivers give their cards."""


def machine(kit: Kit) -> Iterator[Figure]:
    """What `--hardware this` measures, and the preset of the card beside it."""
    threads = read_processor().threads
    found = measure_this(threads, *((_DRY_BYTES,) if kit.dry else ()))
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
    expected = told.gpu.bandwidth * told.gpu.efficiency.matrix
    yield Figure(
        name=f"GPU, measured over {preset}'s",
        value=found.gpu.bandwidth / expected,
        unit="×",
        least=0.9,
        most=1.1,
    )
    expected = told.link.bandwidth * told.link.efficiency
    yield Figure(
        name=f"link, measured over {preset}'s",
        value=found.link.bandwidth / expected,
        unit="×",
        least=0.9,
        most=1.1,
    )


def runs(kit: Kit) -> Iterator[Figure]:
    """Estimates of every benchmark that the stage `hybrid` left, over what it measured."""
    files = sorted(kit.work.rglob(BENCH.name))
    if not files:
        raise Absent("no benchmark: run the stage hybrid before")
    for path in files:
        bench = BENCH.read(path)
        budgets = {arm.vram_budget_bytes for arm in bench.arms if arm.vram_budget_bytes is not None}
        config = EstimateConfig(
            file=path.parent / bench.file,
            hardware="this",
            bench=path,
            vram_budget=str(max(budgets)) if budgets else None,
            threads=bench.arms[0].threads,
        )
        found = estimate(config).tokens_per_second
        for arm in ("all_neurons", "predicted"):
            measured, told = bench.arm(arm), found[arm]
            if measured is not None and told is not None:
                yield Figure(
                    name=f"{path.parent.relative_to(kit.work)}: {arm.replace('_', ' ')}, estimate",
                    value=told / measured.decode.tokens_per_second,
                    unit="×",
                    details={"estimate": told, "measured": measured.decode.tokens_per_second},
                )


STEPS = (
    Step(name="machine", seconds=12, run=machine),
    Step(name="runs", seconds=10, run=runs),
)
"""Of this stage."""
