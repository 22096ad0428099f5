"""How fast a cluster's worker collects and trains: measured figures, scaled to its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from os.path import exists

from architectures.checkpoint import open_source
from architectures.registry import resolve
from architectures.spec import Architecture, ModelShape
from common.errors import CheckpointError
from common.machine import CPU_SHARE, GPU_SHARE
from cost_model.cluster import Cluster
from cost_model.hardware import HardwareError
from predictor.size import Size
from predictor.training.settings import Recipe

RAY, IMPORTS, FIRST_LAYER = 1.7, 2.0, 4.3
"""Seconds: reaching a cluster, a worker's start, and what the first layer of a process on a GPU
takes longer."""

DISPATCH = 0.006
"""Seconds between two items of a worker."""

LAYER_COMMIT = 0.06
"""Seconds of the driver for a layer: its commit and its thresholds."""

SHARD_COMMIT, SHARD_LAYER, SHARD_SEGMENT = 3.4e-3, 0.25e-3, 9e-6
"""Seconds of the driver for a shard: the manifest, the rename of a layer's file, and each run of
rows of a document that the manifest holds by then, for it is written anew each time."""

RECORDED = 1.52
"""A recording pass's time over the bare one's."""

WRITER = 6.1e9
"""Bytes a second that a process on a GPU writes at most, into memory."""

MEASURED = (
    "GPU: a layer of 7B width takes 1 µs a token (0.41 of an H100's data sheet), recorded 1.31 to "
    f"{RECORDED} times that; rows are written at {WRITER / 1e9:g} GB/s at most; a training step "
    "1.3 ms, of which 0.52 are arithmetic at rank 256; a layer 0.5 s beside its steps",
    "CPU: a layer of 7B width trains at 1.1 ms a row at rank 256, 12 s beside, on a thread of 75 "
    "GFLOP/s",
    f"driver, on one machine's disk: {1e3 * SHARD_COMMIT:g} ms a shard, {1e3 * SHARD_LAYER:g} ms a "
    f"layer of it and {1e6 * SHARD_SEGMENT:g} µs for each document in the manifest so far; "
    f"{1e3 * LAYER_COMMIT:g} ms a trained layer",
    f"start-up: {RAY:g} s to reach a cluster, {IMPORTS:g} s a worker, {FIRST_LAYER:g} s more for "
    f"its first layer on a GPU; {1e3 * DISPATCH:g} ms from item to item",
)
ASSUMED = (
    "these figures are the same for other cards, grow as weights times rank, and are those of the "
    "driver on a shared file system too",
    "recording costs a CPU what it costs a GPU; every layer takes as long as the widest that psp "
    "may choose",
    "workers do not disturb each other; a node reads the model once, and a layer its traces, from "
    "the shared file system; nothing fails",
)

_WIDTH, _NEURONS, _RANK = 4096, 11008, 256
_STEP, _ARITHMETIC, _STEP_ROWS, _FIXED, _CARD = 1.3e-3, 0.52e-3, 256, 0.5, 0.41 * 989.4e12
_CPU_ROW, _CPU_FIXED, _CPU = 1.13e-3, 12.0, 74.6e9


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """A model by its config alone.

    Attributes:
        architecture: its family.
        shape: its sizes.
    """

    architecture: Architecture
    shape: ModelShape

    @classmethod
    def open(cls, model: str) -> PlannedModel:
        """Read a directory's config.json, or a GGUF file's keys.

        Raises:
            CheckpointError: no such thing, or a model that psp does not support.
        """
        if not exists(model):
            raise CheckpointError(
                f"{model}: no such directory",
                "pass one with the model's config.json, or a GGUF file",
            )
        origin = open_source(model)
        try:
            architecture = resolve(origin.config)
            return cls(architecture=architecture, shape=architecture.read_shape(origin.config))
        except CheckpointError as error:
            raise origin.refusal(error) from error

    def numbers(self, *, per_layer: bool) -> int:
        """Return the numbers of a layer, or of what lies outside of all."""
        return sum(
            _product(rule.shape(self.shape))
            for rule in self.architecture.tensors
            if rule.per_layer == per_layer
        )

    def operations(self, context: int) -> float:
        """Return the operations of a token in a layer: its products, and attention on average."""
        attended = 2 * self.shape.n_heads * self.shape.head_dim * context
        return 2 * self.numbers(per_layer=True) + attended

    @property
    def head_operations(self) -> float:
        """Those of a token in the output head."""
        return 2 * self.shape.d_model * self.shape.vocab_size

    def trace_row(self, active: float, importance_bits: int) -> float:
        """Return the bytes of a token in a layer's traces."""
        shape = self.shape
        codes = active * shape.d_ff * importance_bits / 8
        return 2 * shape.d_model + -(-shape.d_ff // 8) + 4 + codes


@dataclass(frozen=True, kw_only=True)
class TrainingRates:
    """Seconds of a layer's training, as `pipeline.probe.Rates` has them.

    Attributes:
        fixed: whatever its rows.
        row: that a row adds, all epochs together.
    """

    fixed: float
    row: float

    @classmethod
    def of(cls, shape: ModelShape, size: Size, recipe: Recipe, cluster: Cluster) -> TrainingRates:
        """Scale what was measured of a layer of LLaMA-7B's width."""
        gate = shape.d_model * shape.d_ff / (_WIDTH * _NEURONS)
        factors = (shape.d_model + shape.d_ff) * size.rank / ((_WIDTH + _NEURONS) * _RANK)
        epochs = recipe.epochs
        if not cluster.on_gpu:
            slower = _CPU / cluster.compute
            return cls(fixed=_CPU_FIXED * gate * slower, row=_CPU_ROW * factors * slower * epochs)
        slower = _CARD / cluster.compute
        step = max(_STEP, _ARITHMETIC / _STEP_ROWS * recipe.batch * factors * slower)
        return cls(fixed=_FIXED * gate * slower, row=step / recipe.batch * epochs)


@dataclass(frozen=True, kw_only=True)
class Held:
    """How workers hold a model.

    Attributes:
        stages: workers that hold it together.
        loaded: bytes that they read.
        width: bytes of a number.
    """

    stages: int
    loaded: float
    width: int

    @classmethod
    def of(cls, model: PlannedModel, cluster: Cluster) -> Held:
        """Return how few workers hold a model, as a GPU (16 bits) or a CPU (float32) does.

        Weights fill as much of the memory as they may in `common.machine.weight_budget`.

        Raises:
            HardwareError: not even one of its blocks fits into a worker.
        """
        width = 2 if cluster.on_gpu else 4
        block = width * model.numbers(per_layer=True)
        rest = width * model.numbers(per_layer=False)
        budget = (GPU_SHARE if cluster.on_gpu else CPU_SHARE) * cluster.memory
        blocks = int((budget - rest) // block)
        if blocks < 1:
            raise HardwareError(
                f"a worker of {cluster.name} holds {budget / 1e9:.3g} GB of weights, a block and "
                f"what lies outside of all take {(block + rest) / 1e9:.3g} GB",
                "plan with larger memories, or fewer workers a node",
            )
        layers = model.shape.n_layers
        return cls(stages=-(-layers // blocks), loaded=layers * block + rest, width=width)


def _product(sizes: tuple[int, ...]) -> int:
    number = 1
    for size in sizes:
        number *= size
    return number
