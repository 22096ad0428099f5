"""Where a setting does not fit the model, the text or the machine: what to set instead."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from architectures.checkpoint import Checkpoint
from common.element_types import ELEMENT_TYPES, F16
from common.machine import read_memory, weight_budget
from common.units import decimal_size, parse_size, size
from pipeline.costs import Cost, Costs
from pipeline.settings import RunConfig
from pipeline.text import TextPlan

_ROWS_A_NEURON = 16
"""Trace rows for each neuron of a layer below which predictors hardly generalise: 400,000 tokens
for LLaMA-7B's 11,008 neurons are 36, as published (README, docs/train-predictor.md)."""

_PREDICTOR_SHARE = 0.15
"""Of the FFN's bytes for the predictor alone, above which little can be won."""

_SPARSE = 0.5
"""Sparsity below which skipping neurons hardly pays."""

_WHOLE_DAY = 86_400.0


def advice(config: RunConfig, checkpoint: Checkpoint, text: TextPlan) -> Iterator[str]:
    """Yield a line for each setting that does not fit the model or the text."""
    shape = checkpoint.shape
    if config.context > shape.context_length:
        yield (
            f"--context {config.context} is longer than the model's {shape.context_length} "
            "positions, which are taken"
        )
    context = min(config.context, shape.context_length)
    if text.median < context // 4:
        yield (
            f"half of the documents have at most {text.median} tokens, windows of --context "
            f"{context} are seldom full: predictors will know little of later positions"
        )
    if text.ended:
        yield f"the text gives {text.tokens} tokens for traces, not --tokens {config.tokens}"
    enough = _ROWS_A_NEURON * shape.d_ff
    if text.tokens < enough:
        wanted = math.ceil(enough / 10_000) * 10_000
        remedy = "pass more text and" if text.ended else "pass"
        yield (
            f"{text.tokens} tokens are few for {shape.d_ff} neurons a layer: {remedy} "
            f"--tokens {wanted} or more"
        )
    yield from _ranks(config, checkpoint)


def _ranks(config: RunConfig, checkpoint: Checkpoint) -> Iterator[str]:
    shape, ffn = checkpoint.shape, ELEMENT_TYPES[config.outtype or F16]
    element = ELEMENT_TYPES.get(config.predictor_type, ELEMENT_TYPES[F16])
    rank = config.rank if isinstance(config.rank, int) else 0
    if isinstance(config.rank, tuple):
        rank = max(config.rank)
    share = element.relative(
        rank,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        ffn_matrices=checkpoint.architecture.ffn_matrices,
        ffn=ffn,
    )
    if rank and share > _PREDICTOR_SHARE:
        yield (
            f"predictors of --rank {rank} alone read {share:.0%} of the FFN's bytes: pass a lower "
            "one, or --rank auto"
        )


def machine_advice(config: RunConfig, costs: Costs, by_step: dict[str, Cost]) -> Iterator[str]:
    """Yield a line for each setting that does not fit the machine, or what the probe found."""
    rates, memory = costs.rates, read_memory()
    if not config.sparsify and rates.sparsity < _SPARSE:
        yield (
            f"the first layer is only {rates.sparsity:.0%} sparse: skipping neurons pays little, "
            "pass --sparsify if the model is gated"
        )
    if config.device == "cpu" and torch.cuda.is_available():
        yield "a GPU is here and --device is cpu: leave it out to run and train there"
    if config.weights == "resident":
        needed = by_step["collect"].memory
        if needed > weight_budget(config.device):
            yield (
                f"the model takes {size(needed)} in memory: pass --weights streamed, or leave "
                "--weights out"
            )
    peak = max(by_step, key=lambda name: by_step[name].memory)
    if by_step[peak].memory > memory.usable:
        yield (
            f"{peak} needs about {size(by_step[peak].memory)} of memory, this machine gives "
            f"{size(memory.usable)}: {_LESS_MEMORY.get(peak, 'pass --weights streamed')}"
        )
    if config.vram_budget is not None and parse_size(config.vram_budget) > costs.file:
        yield (
            f"--vram-budget {config.vram_budget} holds the whole file of "
            f"{decimal_size(int(costs.file))}: the gain of predictors is small there"
        )
    seconds = sum(cost.seconds for cost in by_step.values())
    slowest = max(by_step, key=lambda name: by_step[name].seconds)
    if seconds > _WHOLE_DAY:
        yield f"this takes days, most of it {slowest}: {_LESS_TIME.get(slowest, 'use a GPU')}"


_LESS_MEMORY = {
    "sparsify": "run psp sparsify --checkpointing on several GPUs first",
    "collect": "pass --weights streamed, a lower --batch or --context",
    "train-predictor": "pass a fixed --rank, which needs no run of the model",
}
_LESS_TIME = {
    "sparsify": "pass a shorter --schedule, or run on a GPU",
    "collect": "pass a lower --tokens, or run on a GPU",
    "train-predictor": "pass --recipe svd, a fixed --rank, a lower --tokens, or run on a GPU",
}
