"""What each step of a run will take: time, disk and memory, from sizes and a probe's rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from gguf import GGML_QUANT_SIZES

from architectures.checkpoint import Checkpoint
from architectures.model import block_bytes
from common.element_types import ELEMENT_TYPES
from common.machine import weight_budget
from gguf_export.plan import plan_model
from gguf_export.pwri.element_types import FileTypes
from gguf_export.smallthinker.types import DENSE_TYPES
from pipeline.probe import Rates
from pipeline.steps import StepSettings
from predictor.size import Size
from predictor.training.bounds import bound_of
from predictor.training.settings import RECIPES, TrainConfig, possible_sizes
from predictor.training.sizes import SCOUT_ROWS
from predictor.training.start import MOMENT_ROWS

_PASSES = 3
"""A training step's passes: one forward, two backward."""

_TRAINED_BYTES = 16
"""Of a weight in training: itself, its gradient and AdamW's two moments, float32."""

_KEPT_WIDTHS, _LOGITS = (8, 4), 3
"""What a token leaves in a block for the backward pass, in hidden and FFN sizes, and logits with
their gradients; with SmolLM2-135M, 1024 tokens at once, it makes up 1.9 GB of a peak of 4.9."""

_KEPT_BYTES = 2 * 12
"""Of a weight in the two checkpoints of a sparsification."""

MEASUREMENTS = 3.25
"""Of the perplexity gap, mostly at most: a quarter of the text, then all of it up to three times
(`predictor.thresholds.choose`; five are the limit)."""

_ENGINE = 1.5
"""The embedded engine's time over transformers': it rounds every vector."""

_LAYER_SECONDS = 5e-4
"""Of a decoded token in the embedded engine, beside reading weights."""

_VERIFIED_TOKENS = (256 * 3, 256 * 4 * 2)
"""Run by `psp verify`: logits of three kinds, and two perplexities."""

_DRAWING = 6.0
"""Seconds for the figures of the predictors' report and the page."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a step takes.

    Attributes:
        seconds: its time.
        disk: bytes that it leaves.
        memory: bytes that it holds at most, weights and buffers; what torch itself takes is apart.
    """

    seconds: float
    disk: float
    memory: float

    def bounded(self) -> Cost:
        """Return it with a second at least, which every step takes to begin."""
        return replace(self, seconds=max(self.seconds, 0.1))


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of a run's steps.

    Attributes:
        checkpoint: the model.
        settings: of the commands.
        rates: of the probe.
    """

    checkpoint: Checkpoint
    settings: StepSettings
    rates: Rates

    def all(self) -> dict[str, Cost]:
        """Return the cost of every step by its name."""
        report = _DRAWING + self._layers * self.rates.layer_fixed
        costs = {
            "sparsify": self._sparsify(),
            "hold out text": Cost(seconds=0.1, disk=4 * self._bench_tokens, memory=0),
            "collect": self._collect(),
            "train-predictor": self._train(),
            "export-gguf": self._export(),
            "verify": self._verify(),
            "bench-powerinfer": self._bench(),
            "report": Cost(seconds=report, disk=1e6, memory=0),
        }
        return {name: cost.bounded() for name, cost in costs.items()}

    @property
    def _layers(self) -> int:
        return self.checkpoint.shape.n_layers

    @property
    def _layer_weights(self) -> float:
        return block_bytes(self.checkpoint, torch.float16) / 2

    @property
    def _weights(self) -> float:
        """Numbers of the whole model."""
        shape, rules = self.checkpoint.shape, self.checkpoint.architecture.tensors
        rest = sum(torch.Size(rule.shape(shape)).numel() for rule in rules if not rule.per_layer)
        return self._layers * self._layer_weights + rest

    @property
    def _bench_tokens(self) -> int:
        return self.settings.bench.chunks * self.settings.bench.context

    def _forward(self, tokens: float) -> float:
        """Return the seconds that tokens take through the model and its head."""
        shape = self.checkpoint.shape
        head = shape.vocab_size * shape.d_model / self._layer_weights
        return tokens * self.rates.token_layer * (self._layers + head)

    def _resident(self, width: float) -> float:
        """Return the bytes of a model in memory: streamed, one layer and what is no layer."""
        device = self.settings.collect.device
        whole, layer = width * self._weights, width * self._layer_weights
        streamed = self.settings.collect.weights == "streamed"
        if streamed or self._layers * layer > weight_budget(device):
            return whole - (self._layers - 1) * layer
        return whole

    def _sparsify(self) -> Cost:
        settings = self.settings.sparsify
        if settings is None:
            return Cost(seconds=0, disk=0, memory=0)
        tokens = settings.schedule.steps * settings.step_windows(1) * settings.context
        stored, shape = self.checkpoint.dtype.itemsize, self.checkpoint.shape
        kept = self._layers * (_KEPT_WIDTHS[0] * shape.d_model + _KEPT_WIDTHS[1] * shape.d_ff)
        token = 4 * (kept + _LOGITS * shape.vocab_size)
        return Cost(
            seconds=_PASSES * self._forward(tokens),
            disk=self._weights * max(stored, _KEPT_BYTES),
            memory=self._weights * _TRAINED_BYTES + settings.batch * settings.context * token,
        )

    def _collect(self) -> Cost:
        settings, shape, layers = self.settings.collect, self.checkpoint.shape, self._layers
        rows = settings.tokens
        layer = self.rates.row_bytes * rows + 2 * shape.d_model * shape.d_ff + 4 * shape.d_ff
        batch = 4 * settings.batch * min(settings.context, shape.context_length)
        return Cost(
            seconds=layers * (rows * self.rates.token_layer + self.rates.load_layer),
            disk=layers * layer,
            memory=self._resident(4) + 3 * batch * (shape.d_ff + 2 * shape.d_model),
        )

    def _train(self) -> Cost:
        settings, shape, rates = self.settings.train, self.checkpoint.shape, self.rates
        held = settings.holdout * self.settings.collect.tokens
        rows = self.settings.collect.tokens - held
        layer = layer_seconds(settings, self._sizes, rows, rates.layer_fixed, rates.layer_row)
        seconds = self._layers * layer / rates.jobs
        gate = 4 * shape.d_model * shape.d_ff
        memory = rates.jobs * (4 * gate + 4 * min(rows, MOMENT_ROWS) * shape.d_model)
        bound = bound_of(settings)
        if bound is not None and bound.max_ppl_gap is not None:
            tokens = min(settings.eval_tokens, held)
            seconds += (1 + MEASUREMENTS) * self._forward(tokens)
            memory = max(memory, self._resident(4) + 2 * tokens * shape.vocab_size)
        return Cost(seconds=seconds, disk=self._layers * self._predictor(2), memory=memory)

    def _predictor(self, width: float) -> float:
        """Return the bytes of a layer's predictor at most, by those of a number in float16."""
        shape, ranks = self.checkpoint.shape, self.settings.train.fixed_ranks
        widest = max(ELEMENT_TYPES[size.kind].width for size in self._sizes)
        rank = sum(ranks) / len(ranks) if ranks else max(size.rank for size in self._sizes)
        return width * widest * rank * (shape.d_model + shape.d_ff)

    @property
    def _sizes(self) -> list[Size]:
        """What a layer's predictor may be."""
        settings = self.settings.train
        bounded = bound_of(settings) is not None
        return possible_sizes(settings, self.checkpoint.shape.d_model, bounded=bounded)

    @property
    def file(self) -> float:
        """Bytes of the PowerInfer file."""
        types = self.settings.export.types
        predictor = self._predictor(2)
        return self._exported(types) + self._layers * predictor

    def _exported(self, types: FileTypes) -> float:
        """Return the bytes of the model in the file; a sparse one is made in a directory first."""
        if self.settings.sparsify is not None:
            return 2 * ELEMENT_TYPES[types.weights].width * self._weights
        return sum(each.size for each in plan_model(self.checkpoint, sparse=True, types=types))

    @property
    def _dense(self) -> float:
        """Bytes of the dense file."""
        export = self.settings.export
        if export.dense_type is None:
            return export.dense * self.file
        block, block_bytes = GGML_QUANT_SIZES[DENSE_TYPES[export.dense_type]]
        return self._weights * float(block_bytes / block)

    def _export(self) -> Cost:
        pickled = self._layers * self._predictor(2)
        read = 4 * self._weights / self.rates.read
        disk = self.file + self._dense + pickled
        return Cost(
            seconds=disk / self.rates.write + 3 * read,
            disk=disk,
            memory=8 * self._layer_weights,
        )

    def _verify(self) -> Cost:
        tokens = min(1.0, self.checkpoint.shape.context_length / 256) * sum(_VERIFIED_TOKENS)
        read = 4 * self._weights / self.rates.read
        return Cost(
            seconds=3 * read + _ENGINE * self._forward(tokens),
            disk=0,
            memory=self._resident(4),
        )

    def _bench(self) -> Cost:
        settings, layers = self.settings.bench, self._layers
        passes = 2 * _ENGINE * self._forward(self._bench_tokens)
        runs = 2 * (settings.repeats + settings.warm_up)
        token = 4 * self._weights / self.rates.read + layers * _LAYER_SECONDS
        if settings.powerinfer_bin is not None:
            passes += 2 * self._forward(self._bench_tokens) * torch.get_num_threads()
            runs += (settings.repeats + settings.warm_up) * (settings.dense_gguf is not None)
            token = self.file / self.rates.read
        return Cost(
            seconds=passes + runs * settings.generate * token,
            disk=0,
            memory=self._resident(4),
        )


def layer_seconds(
    settings: TrainConfig, sizes: Sequence[Size], rows: float, fixed: float, row: float
) -> float:
    """Return the seconds of a layer's training, its scouts included.

    Args:
        settings: of the training.
        sizes: what the layer's predictor may be.
        rows: that it is trained on.
        fixed: seconds of a training whatever its rows.
        row: seconds that a row adds, all epochs together.
    """
    seconds, recipe = fixed + row * rows, RECIPES[settings.recipe]
    if len(sizes) > 1 and recipe.start != "random":
        scout = fixed + row / max(recipe.epochs, 1) * min(rows, SCOUT_ROWS)
        seconds += len({size.rank for size in sizes}) * scout
    return seconds
