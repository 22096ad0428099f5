"""What a benchmark of the operators runs: sizes, active neurons, inputs that make them active."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from architectures.model import choose_device
from common.errors import EngineError, SettingsError
from predictor.traces.packing import unpack_active
from predictor.traces.store import TraceStore
from sparse_operators.settings import SHAPES, SPARSITIES, OperatorBenchConfig

RUNS = {"random": 1, "clustered": 64}
"""Neighbours that are active together, by the pattern's name."""

_TRACED_TOKENS = 1024
"""Tokens of a layer to draw masks from, spread over the traces."""

_MAX_SLOTS = 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """A share of active neurons to measure at.

    Attributes:
        share: of active neurons, in the mean.
        draw: returns `count` tokens' masks, (count, d_ff) bool on the CPU, true where active.
    """

    share: float
    draw: Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What to measure.

    Attributes:
        d_model: hidden size.
        d_ff: neurons.
        dtype: of weights and inputs.
        device: of the CPU or CUDA.
        cases: by label.
    """

    d_model: int
    d_ff: int
    dtype: torch.dtype
    device: torch.device
    cases: Mapping[str, Case]

    @property
    def matrix_bytes(self) -> int:
        """Size of one of the FFN's three matrices."""
        return self.d_model * self.d_ff * self.dtype.itemsize

    def slots_needed(self, cache: int) -> int:
        """Return how many matrices, read by turns, no cache of `cache` bytes can help with."""
        # A graph calls the sparse operator alone; on the CPU dense calls stream in between, and two
        # thirds of what a turn reads is theirs.
        on_cpu = self.device.type == "cpu"
        share = 2 / 3 if on_cpu else min(case.share for case in self.cases.values())
        return math.ceil(2 * cache / (self.matrix_bytes * max(share, 1 / self.d_ff)))

    def slot_count(self, cache: int, turn: int) -> int:
        """Return how many matrices to read by turns.

        Args:
            cache: bytes of the largest cache.
            turn: how many matrices a turn reads; operations change slots from turn to turn.
        """
        slots = max(4, min(_MAX_SLOTS, self.slots_needed(cache)))
        while math.gcd(slots, turn) > 1:
            slots += 1
        return slots


def workload(config: OperatorBenchConfig) -> Workload:
    """Return what settings ask to measure.

    Raises:
        CheckpointError: there is no such device.
        TraceError: a pattern is neither known nor traces.
        SettingsError: settings do not go together, or the operators do not run on the device.
    """
    device = torch.device(choose_device(config.device))
    if device.type not in ("cpu", "cuda"):
        raise SettingsError(f"--device {config.device}: the operators run on cpu and cuda")
    if config.tune and device.type != "cuda":
        raise SettingsError("--tune measures kernels that run on a GPU alone", "pass --device cuda")
    automatic = "float32" if device.type == "cpu" else "float16"
    dtype: torch.dtype = getattr(torch, automatic if config.dtype == "auto" else config.dtype)
    d_model, d_ff, cases = _cases(config)
    return Workload(d_model=d_model, d_ff=d_ff, dtype=dtype, device=device, cases=cases)


def _cases(config: OperatorBenchConfig) -> tuple[int, int, dict[str, Case]]:
    if config.pattern in RUNS:
        d_model, d_ff = config.shape or SHAPES["7b"]
        shares = config.sparsity or SPARSITIES
        run = RUNS[config.pattern]
        cases = {f"{100 * share:g} %": random_case(d_ff, share, run=run) for share in shares}
        return d_model, d_ff, cases
    if config.shape or config.sparsity:
        raise SettingsError("traces bring their --shape and --sparsity", "leave these out")
    store = TraceStore.open(Path(config.pattern))
    tokens = torch.linspace(0, store.rows - 1, min(store.rows, _TRACED_TOKENS)).long()
    d_model, d_ff, layers = store.header.d_model, store.header.d_ff, store.header.layers
    masks = {f"layer {n}": unpack_active(store.layer(n).active_at(tokens), d_ff) for n in layers}
    return d_model, d_ff, {label: traced_case(each) for label, each in masks.items()}


def random_case(d_ff: int, sparsity: float, *, run: int = 1) -> Case:
    """Return a case of made-up tokens; see `random_masks`."""
    draw = partial(random_masks, d_ff=d_ff, sparsity=sparsity, run=run)
    return Case(share=1 - sparsity, draw=draw)


def traced_case(masks: Tensor) -> Case:
    """Return a case of real tokens, whose masks are (tokens, d_ff) bool."""
    return Case(share=float(masks.float().mean()), draw=partial(draw_rows, masks))


def random_masks(
    count: int, generator: torch.Generator, *, d_ff: int, sparsity: float, run: int
) -> Tensor:
    """Draw which neurons are active.

    Args:
        count: masks to draw.
        generator: source of chance, on the CPU.
        d_ff: neurons.
        sparsity: share of inactive neurons, met exactly but for rounding to whole neurons.
        run: neurons that are active or inactive together; one run may be cut short.

    Returns:
        (count, d_ff) bool on the CPU, true where active.
    """
    active = round((1 - sparsity) * d_ff)
    keys = torch.rand(count, -(-d_ff // run), generator=generator)
    order = keys.repeat_interleave(run, 1)[:, :d_ff].argsort(stable=True)
    return torch.zeros(count, d_ff, dtype=torch.bool).scatter_(1, order[:, :active], True)


def draw_rows(masks: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` rows of (tokens, d_ff) masks, some twice if there are too few."""
    rounds = -(-count // len(masks))
    order = [torch.randperm(len(masks), generator=generator) for _ in range(rounds)]
    return masks[torch.cat(order)[:count]]


def draw_slots(case: Case, slots: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Draw (slots, tokens, d_ff) masks, those of a slot's tokens apart from each other."""
    masks = case.draw(slots * tokens, generator)
    return masks.view(slots, tokens, masks.shape[1])


def scores_of(masks: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return gate scores, any mask's shape, positive exactly where it is true."""
    size = torch.rand(masks.shape, generator=generator) + 0.1
    return torch.where(masks, size, -size).to(dtype)


def intermediate_of(masks: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return values of either sign, at least 0.1 in size where the mask is true and 0 elsewhere."""
    size = torch.rand(masks.shape, generator=generator) + 0.1
    sign = torch.where(torch.rand(masks.shape, generator=generator) < 0.5, -1.0, 1.0)
    return torch.where(masks, sign * size, 0.0).to(dtype)


def draw_weights(work: Workload, slots: int, generator: torch.Generator) -> Tensor:
    """Return (slots, d_ff, d_model) normal numbers, the same ones at every place.

    Raises:
        EngineError: the device's memory does not hold them.
    """
    shape = (work.d_ff, work.d_model)
    try:
        one = torch.randn(shape, generator=generator).to(work.device, work.dtype)
        weights = torch.empty(slots, *shape, dtype=work.dtype, device=work.device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one, too
        gigabytes = slots * work.matrix_bytes / 1e9
        raise EngineError(
            f"{work.device}: no memory for {slots} matrices of {shape}, {gigabytes:.1f} GB in all",
            "choose a smaller --shape",
        ) from error
    return weights.copy_(one)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the operators are given.

    Attributes:
        x: (slots, tokens, d_model).
        scores: (slots, tokens, d_ff).
        intermediate: (slots, tokens, d_ff), S3's input.
        active: mean number of neurons that some token of a slot activates.
    """

    x: Tensor
    scores: Tensor
    intermediate: Tensor
    active: float

    @classmethod
    def draw(cls, work: Workload, masks: Tensor, generator: torch.Generator) -> Inputs:
        """Draw inputs that make the neurons of (slots, tokens, d_ff) masks active."""
        dtype = work.dtype
        x = torch.randn(*masks.shape[:2], work.d_model, generator=generator).to(dtype)
        return cls(
            x=x.to(work.device),
            scores=scores_of(masks, dtype, generator).to(work.device),
            intermediate=intermediate_of(masks, dtype, generator).to(work.device),
            active=float(masks.any(1).sum(1).float().mean()),
        )
