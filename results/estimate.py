"""`estimate.json` of `psp estimate`: what bytes and bandwidths allow an exported file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.typed_json import Count, Positive, Share
from cost_model.calibration import Prediction
from cost_model.hardware import Hardware
from cost_model.model_bytes import Activity
from results.parts import Amount, ResultFile


@dataclass(frozen=True, kw_only=True)
class HardwareFacts(Hardware):
    """All figures of the hardware.

    Attributes:
        byte_seconds: what one byte of an FFN neuron costs, by device.
    """

    byte_seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ActivityFacts:
    """How many neurons are computed: their means, by layer, and the source."""

    source: str
    predicted: Share
    predicted_and_active: Share
    active: Share
    layers: tuple[Activity, ...]


@dataclass(frozen=True, kw_only=True)
class Speedups:
    """How many times as fast predicted neurons are expected to be."""

    predicted_over_dense: Positive
    predicted_over_all_neurons: Positive


@dataclass(frozen=True, kw_only=True)
class DenseFacts:
    """The dense model.

    Attributes:
        bytes: of its file.
        kv_cache_bytes: of its cache.
        fits_on_gpu: whether all of it goes into VRAM.
        n_gpu_layers: the best number to offload; None without a GPU.
    """

    bytes: Count
    kv_cache_bytes: Count
    fits_on_gpu: bool
    n_gpu_layers: Count | None = None


@dataclass(frozen=True, kw_only=True)
class PlacementFacts:
    """What a budget of VRAM holds."""

    everything_but_ffn_fits: bool
    kv_cache_in_vram: bool
    neuron_share_on_gpu: Share
    activation_share_on_gpu: Share


@dataclass(frozen=True, kw_only=True)
class _Budget:
    """Size and speed of a budget.

    Attributes:
        tokens_per_second: of predicted neurons.
        dense_tokens_per_second: of a dense engine with as many layers there as fit.
    """

    bytes: Count
    powerinfer_option: str
    fits_on_card: bool
    tokens_per_second: Positive
    dense_tokens_per_second: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class VramBudget(PlacementFacts, _Budget):
    """What predicted neurons gain of a budget of VRAM.

    Attributes:
        best: whether it is the smallest of those next to the fastest.
    """

    best: bool


@dataclass(frozen=True, kw_only=True)
class CalibrationFacts:
    """How well the fitted figures explain measured runs.

    Attributes:
        largest_error: of seconds, relative.
        largest_ratio_error: of predicted over all neurons; None without such a pair.
        left_out: whether no fit has seen what it explains.
        passed_over: PowerInfer's runs that had a GPU, which the fit does not use.
    """

    runs: tuple[Prediction, ...]
    largest_error: Amount
    largest_ratio_error: Amount | None = None
    left_out: bool
    passed_over: Count = 0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An estimate; nothing in it was measured.

    Attributes:
        label: says so.
        hardware: name of what it is for.
        context: tokens that the cache has room for.
        position: tokens in it.
        assumptions: what was taken for granted, a line each.
        tokens_per_second: by `dense`, `all_neurons`, `predicted`, as the next ones.
        seconds: of a token, by part.
        device_seconds: that each device is busy.
        device_bytes: that it reads.
        vram_budget_bytes: None without a GPU, as what follows.
    """

    kind: Literal["psp.estimate"] = "psp.estimate"
    schema_version: Literal[1] = 1
    label: Literal["estimate"] = "estimate"
    tool_version: str
    model: str
    file: str
    hardware: str
    hardware_details: HardwareFacts
    context: Count
    position: Amount
    activity: ActivityFacts
    assumptions: tuple[str, ...]
    tokens_per_second: dict[str, Positive]
    speedups: Speedups
    seconds: dict[str, dict[str, float]]
    device_seconds: dict[str, dict[str, float]]
    device_bytes: dict[str, dict[str, float]]
    dense: DenseFacts
    vram_budget_bytes: Count | None = None
    placement: PlacementFacts | None = None
    vram_budgets: tuple[VramBudget, ...]
    best_vram_budget: VramBudget | None = None
    calibration: CalibrationFacts | None = None


ESTIMATE = ResultFile(
    name="estimate.json",
    maker="psp estimate NAME.powerinfer.gguf --hardware this --bench DIR --out DIR",
    content=Estimate,
)
