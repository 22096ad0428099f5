"""`psp estimate`: tokens per second that bytes and bandwidths allow an exported file.

Everything in it is an estimate: sums of bytes over bandwidths (`cost_model.roofline`), with
PowerInfer's own placement (`gguf_export.pwri.memory_plan`) and our choice of neurons
(`gguf_export.gpu_split`). Nothing is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from common.errors import EngineError
from common.files import refuse_existing
from common.lock import locked
from common.units import parse_size
from common.version import tool_version
from cost_model.hardware import ASSUMED_THREADS, Hardware, load_hardware, save_hardware
from cost_model.model_bytes import Activity, on_cpu
from cost_model.roofline import Cost, best_dense, sparse_token
from gguf_export.pwri.memory_plan import KEPT_FREE, vram_option
from powerinfer_bridge.estimate.calibration import calibrate_hardware
from powerinfer_bridge.estimate.file import PASS_BENCH, EstimatedFile, Placement
from powerinfer_bridge.estimate.settings import EstimateConfig
from results.bench import BENCH, Bench
from results.estimate import (
    ESTIMATE,
    ActivityFacts,
    DenseFacts,
    Estimate,
    HardwareFacts,
    Speedups,
    VramBudget,
)

_STEPS = 8
_GOOD_ENOUGH = 0.99


@dataclass(frozen=True, kw_only=True)
class _Case:
    """All that the figures of one estimate share.

    Attributes:
        file: what is estimated.
        hardware: for what.
        layers: how many neurons are computed, by layer.
        context: tokens that the cache has room for.
        position: tokens in it.
        asked: VRAM asked for, bytes; None for the whole card.
    """

    file: EstimatedFile
    hardware: Hardware
    layers: tuple[Activity, ...]
    context: int
    position: float
    asked: int | None

    @property
    def card(self) -> int:
        """VRAM that models may take.

        A dense engine's compute buffers are assumed to take as much as PowerInfer leaves free.
        """
        return max(0, self.hardware.gpu.memory - KEPT_FREE) if self.hardware.gpu else 0

    @property
    def budget(self) -> int:
        """VRAM that the models get."""
        return self.card if self.asked is None else self.asked

    def placement(self, budget: int) -> Placement | None:
        """Where everything lies; None without a GPU."""
        return self.file.place(budget, self.context) if self.hardware.gpu else None

    def sparse(self, placement: Placement | None, activities: Sequence[Activity]) -> Cost:
        """What a token costs in PowerInfer."""
        place = placement.place if placement else on_cpu(self.file.hyper.n_layers)
        return sparse_token(self.file.bytes, place, self.hardware, activities, self.position)

    def dense(self, budget: int) -> tuple[int, Cost]:
        """How many layers a dense engine offloads, and what a token costs in it."""
        return best_dense(self.file.bytes, self.hardware, budget, self.context, self.position)


def estimate(config: EstimateConfig, measured: Bench | None = None) -> Estimate:
    """Estimate a file's speed.

    Args:
        config: what to estimate.
        measured: what `config.bench` holds, if that is known without reading it.

    Returns:
        What estimate.json holds; see docs/estimate.md.

    Raises:
        PspError: a damaged file or hardware, missing statistics, or an existing output.
    """
    for target in (config.out and config.out / ESTIMATE.name, config.save_hardware):
        if target is not None:
            refuse_existing(target, force=config.force)
    file = EstimatedFile(config.file)
    activity, assumptions = _activity(config, measured, file)
    hardware, calibration = load_hardware(config.hardware, config.threads), None
    if config.calibrate:
        hardware, calibration = calibrate_hardware(hardware, config.calibrate, file)
    case = _Case(
        file=file,
        hardware=hardware,
        layers=activity.layers,
        context=config.context,
        position=config.context / 2 if config.position is None else float(config.position),
        asked=_asked_budget(config.vram_budget, hardware),
    )
    found = replace(
        _estimate(case, activity),
        assumptions=(*assumptions, *_assumptions(hardware)),
        calibration=calibration,
    )
    if config.save_hardware:
        save_hardware(config.save_hardware, hardware)
    if config.out:
        with locked(config.out):
            ESTIMATE.write(config.out, found)
    return found


def _activity(
    config: EstimateConfig, measured: Bench | None, file: EstimatedFile
) -> tuple[ActivityFacts, list[str]]:
    """Return how many neurons are computed, and what was taken for granted."""
    if config.density is not None:
        source = f"--density {config.density:g}"
        activity, assumptions = _stated_activity(config.density, config.precision, config.active)
        layers = file.stated_activity(activity)
    else:
        assert config.bench is not None, "the settings have one of both"
        source, assumptions = str(BENCH.path(config.bench)), []
        measured = measured or BENCH.read(config.bench, PASS_BENCH)
        layers = file.measured_activity(measured, source)
    facts = ActivityFacts(
        source=source,
        predicted=fmean(each.predicted for each in layers),
        predicted_and_active=fmean(each.both for each in layers),
        active=fmean(each.active for each in layers),
        layers=layers,
    )
    return facts, assumptions


def _stated_activity(
    density: float, precision: float | None, active: float | None
) -> tuple[Activity, list[str]]:
    """Return the activity of every layer, and what was taken for granted.

    Args:
        density: share of neurons that the predictor lets through.
        precision: share of those that are active; None assumes all.
        active: share of all neurons that are active; None assumes that none is missed.

    Raises:
        EngineError: shares that contradict each other.
    """
    assumptions = []
    if precision is None:
        precision = 1.0
        assumptions.append("every predicted neuron is active, so that down reads all of them")
    both = density * precision
    if active is None:
        active = both
        assumptions.append("no active neuron is missed, so that with all neurons down reads as few")
    if active < both:
        raise EngineError(
            f"--active {active:g} is less than density · precision = {both:g}",
            "raise it or lower --precision",
        )
    return Activity(predicted=density, both=both, active=active), assumptions


def _asked_budget(text: str | None, hardware: Hardware) -> int | None:
    if text is None:
        return None
    if not hardware.gpu:
        raise EngineError(f"--vram-budget: hardware {hardware.name} has no GPU", "leave it out")
    budget = parse_size(text)
    if budget > hardware.gpu.memory:
        raise EngineError(
            f"--vram-budget {text} is more than the {hardware.gpu.memory} bytes of {hardware.name}",
            "lower it",
        )
    return budget


def _estimate(case: _Case, activity: ActivityFacts) -> Estimate:
    """Return an estimate that lacks its assumptions and its calibration."""
    file, hardware = case.file, case.hardware
    placement = case.placement(case.budget)
    n_gpu_layers, dense = case.dense(case.budget)
    everything = case.sparse(placement, [each.all_neurons for each in case.layers])
    predicted = case.sparse(placement, case.layers)
    costs = {"dense": dense, "all_neurons": everything, "predicted": predicted}
    budgets = _budgets(case) if hardware.gpu else ()
    return Estimate(
        tool_version=tool_version(),
        model=file.hyper.name,
        file=str(file.path),
        hardware=hardware.name,
        hardware_details=HardwareFacts(
            **vars(hardware), byte_seconds=hardware.neuron_byte_seconds()
        ),
        context=case.context,
        position=case.position,
        activity=activity,
        assumptions=(),
        tokens_per_second={name: cost.tokens_per_second for name, cost in costs.items()},
        speedups=Speedups(
            predicted_over_dense=dense.seconds / predicted.seconds,
            predicted_over_all_neurons=everything.seconds / predicted.seconds,
        ),
        seconds={name: cost.parts | {"total": cost.seconds} for name, cost in costs.items()},
        device_seconds={name: cost.devices for name, cost in costs.items()},
        device_bytes={name: cost.read for name, cost in costs.items()},
        dense=DenseFacts(
            bytes=file.bytes.dense,
            kv_cache_bytes=file.kv_cache(case.context),
            fits_on_gpu=bool(hardware.gpu) and n_gpu_layers > file.hyper.n_layers,
            n_gpu_layers=n_gpu_layers if hardware.gpu else None,
        ),
        vram_budget_bytes=case.budget if hardware.gpu else None,
        placement=placement.facts if placement else None,
        vram_budgets=budgets,
        best_vram_budget=next((each for each in budgets if each.best), None),
    )


def _assumptions(hardware: Hardware) -> list[str]:
    lines = [*hardware.notes]
    if hardware.threads is not None:
        lines.append(f"the CPU's figures are for --threads {hardware.threads}")
    elif hardware.thread_seconds:
        lines.append(f"PowerInfer starts {ASSUMED_THREADS - 1} threads for every token")
    if hardware.gpu:
        lines.append("copies over the link are counted in PowerInfer's source, not measured")
        lines.append(
            "neurons in VRAM are predicted in the proportion of the statistics beside the file"
        )
    return lines


def _budgets(case: _Case) -> tuple[VramBudget, ...]:
    """Return the figures of some budgets, the best one marked.

    They go in equal steps from nothing to all that the file and the card have a use for, and count
    the point where everything but neurons fits, and the budget asked for. The best is the smallest
    within 1 % of the fastest.
    """
    file, kv = case.file, case.file.kv_cache(case.context)
    top = min(case.card, file.everything + kv)
    points = {top * step // _STEPS for step in range(_STEPS + 1)}
    points |= {each for each in (file.but_neurons, file.but_neurons + kv) if each < top}
    if case.asked is not None:
        points.add(case.asked)
    found = [_budget(case, budget) for budget in sorted(points)]
    fitting = [each for each in found if each.fits_on_card]
    fastest = max(each.tokens_per_second for each in fitting)
    best = next(each for each in fitting if each.tokens_per_second >= _GOOD_ENOUGH * fastest)
    return tuple(replace(each, best=each is best) for each in found)


def _budget(case: _Case, budget: int) -> VramBudget:
    option, granted = vram_option(budget)
    placement = case.placement(granted)
    assert placement is not None
    cost = case.sparse(placement, case.layers)
    _, dense = case.dense(granted)
    return VramBudget(
        bytes=granted,
        powerinfer_option=f"--vram-budget {option}",
        fits_on_card=budget <= case.card,
        tokens_per_second=cost.tokens_per_second,
        dense_tokens_per_second=dense.tokens_per_second,
        **vars(placement.facts),
        best=False,
    )
